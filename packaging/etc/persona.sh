# shellcheck shell=sh
# One line at an interactive login that says which persona applies. Silent for everything else, so
# that scp, sftp, rsync and git find their protocols undisturbed; never fails a login.
case "$-" in
*i*)
    if [ -t 0 ] && [ -t 1 ] && [ ! -e "$HOME/.hushlogin" ] && [ -x /usr/bin/persona ]; then
        /usr/bin/persona greeting 2>/dev/null || :
    fi
    ;;
esac
