"""Which options of which programs have values that are secret: the list that is shipped, and how a rule is written."""

import re
from typing import NamedTuple

EXPECTED = "expected an option like --my-secret, a name like MY_KEY, or 'PROGRAM -x'"


class MaskError(ValueError):
    """A rule that is none; the message says what one looks like."""


class Rule(NamedTuple):
    """An option whose value is secret.

    ``attached`` is what a word begins with that holds the value itself, ``separate`` a word that the value follows;
    empty = there is none.  ``after`` is a word that must come before, ``keep`` the last character of what stays.
    """

    separate: str
    attached: str
    after: str = ""
    keep: str = ""


# Programs, and their options as ``rule_of`` reads them.
SHIPPED = """
mysql mysqldump mysqladmin mysqlimport mysqlshow mysqlcheck mariadb mariadb-dump mariadb-admin: -p=
curl: -u: -U: --user: --proxy-user: -b
lftp: -u,
sshpass: -p
smbclient smbget smbmap smbcacls rpcclient: -U% --user%
ldapsearch ldapmodify ldapadd ldapdelete ldapwhoami ldappasswd ldapcompare: -w -a -s
redis-cli: -a
mongo mongosh mongodump mongorestore mongoexport mongoimport: -p
docker podman nerdctl: login/-p
skopeo buildah: --creds: --src-creds: --dest-creds:
openssl: -k -K
zip unzip: -P
7z 7za 7zr 7zz rar unrar: -p= -hp=
ipmitool: -P -k
snmpget snmpset snmpwalk snmpbulkget snmpbulkwalk snmptrap: -A -X -c
xfreerdp wlfreerdp: /p:= /pth:=
rdesktop plink pscp hydra: -p -pw
useradd usermod groupadd groupmod newusers: -p
swaks: -ap
http https: -a:
az twine: -p
ssh-keygen: -N -P
rclone: pass
vault: login
nmcli: password wifi-sec.psk 802-11-wireless-security.psk
aws: aws_secret_access_key aws_session_token
sqlplus rman expdp impdp sqlldr: USER/PASSWORD
"""


def rule_of(text: str) -> Rule:
    """One option of a program.

    ``-p``: the value follows, or is in the same word.  ``-p=``: only in the same word (``-pVALUE``).  ``-u:``, ``-u,``,
    ``-U%``: of the value only what comes after that character.  ``login/-p``: where the word ``login`` came before.
    Raises ``MaskError``.
    """
    after, _, option = text.rpartition("/") if not text.startswith("/") else ("", "", text)
    keep = option[-1] if option[:1] == "-" and option[-1:] in (":", ",", "%") else ""
    name = option.removesuffix(keep) if keep else option.removesuffix("=")
    if not re.fullmatch(r"[-/]{0,2}[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}", name):
        raise MaskError(f"{text!r}: {EXPECTED}")
    if option.endswith("="):
        return Rule("", name, after)
    attached = name if re.fullmatch("-[A-Za-z0-9]", name) else name + "=" if name.startswith("--") else ""
    return Rule(name, attached, after, keep)
