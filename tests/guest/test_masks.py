"""What is secret in a command line is in no record of it."""

import json
import random
import shlex
import time
from pathlib import Path

import pytest
from persona_guest.core.mask_rules import MaskError
from persona_guest.core.masks import HIDDEN, Masks
from persona_guest.core.masks import READ_MAX as MAX

from tests.broker.audited import audited
from tests.guest.conftest import Run
from tests.some import some

MASKS = Masks()
S = "S3cr3t"  # what must not be there afterwards

# A command line, and what is recorded of it.
SHOWN = [
    ("ls -l", "ls -l"),
    # options by their names
    (f"prog --password={S}", "prog --password=***"),
    (f"prog --password {S} -v", "prog --password *** -v"),
    (f"prog --db-passwd={S} --token {S}", "prog --db-passwd=*** --token ***"),
    (f"prog -password {S}", "prog -password ***"),
    (f"prog --api-key={S} --apikey={S} --access-key {S}", "prog --api-key=*** --apikey=*** --access-key ***"),
    (f"keytool -storepass {S} -keypass {S} -list", "keytool -storepass *** -keypass *** -list"),
    (f"java -Djavax.net.ssl.keyStorePassword={S} -jar x", "java -Djavax.net.ssl.keyStorePassword=*** -jar x"),
    ("gpg --batch --passphrase 'S3cr3t x' -d f", "gpg --batch --passphrase '***' -d f"),
    ("prog --password-file=/etc/x --no-password db", "prog --password-file=/etc/x --no-password db"),
    ("prog --password -v", "prog --password -v"),
    ("prog --compass=north --bypass x", "prog --compass=north --bypass x"),
    # assignments
    (f"env PGPASSWORD={S} psql -h db", "env PGPASSWORD=*** psql -h db"),
    (f"env 'PGPASSWORD={S} {S}' psql", "env 'PGPASSWORD=***' psql"),
    (f"env AWS_SECRET_ACCESS_KEY={S} AWS_ACCESS_KEY_ID=AKIA1 aws s3 ls",
     "env AWS_SECRET_ACCESS_KEY=*** AWS_ACCESS_KEY_ID=AKIA1 aws s3 ls"),
    (f"env MYSQL_PWD={S} SSHPASS={S} REDISCLI_AUTH={S} x", "env MYSQL_PWD=*** SSHPASS=*** REDISCLI_AUTH=*** x"),
    ("env PWD=/home/a OLDPWD=/tmp HOME=/x x", "env PWD=/home/a OLDPWD=/tmp HOME=/x x"),
    # options of programs
    (f"mysql -u root -p{S} db", "mysql -u root -p*** db"),
    ("mysql -u root -p db", "mysql -u root -p db"),
    (f"/usr/bin/sudo /usr/bin/mysqldump -p{S} db", "/usr/bin/sudo /usr/bin/mysqldump -p*** db"),
    ("ssh -p22 host", "ssh -p22 host"),
    (f"sshpass -p {S} ssh -p 22 h", "sshpass -p *** ssh -p 22 h"),
    (f"sshpass -p{S} ssh h", "sshpass -p*** ssh h"),
    (f"curl -u alice:{S} https://x/", "curl -u 'alice:***' https://x/"),
    (f"curl -sSu alice:{S} x", "curl -sSu 'alice:***' x"),
    (f"curl -ualice:{S} --proxy-user=p:{S} x", "curl '-ualice:***' '--proxy-user=p:***' x"),
    ("curl -u alice x", "curl -u alice x"),
    (f"curl -H 'Authorization: Bearer {S}' x", "curl -H 'Authorization: Bearer ***' x"),
    (f"curl -H 'authorization:{S}' -H 'X-Api-Key: {S}' -H 'Accept: a/b' x",
     "curl -H 'authorization:***' -H 'X-Api-Key: ***' -H 'Accept: a/b' x"),
    (f"curl '-HAuthorization: Basic {S}' x", None),
    (f"curl -b sid={S} x", "curl -b *** x"),
    (f"""curl -d '{{"user": "a", "password": "{S}\\"x"}}' x""", """curl -d '{"user": "a", "password": "***"}' x"""),
    (f"curl -d 'user=a&password={S}&x=1' x", "curl -d 'user=a&password=***&x=1' x"),
    (f"wget --http-password={S} https://u:{S}@h/x?token={S}&y=2",
     "wget --http-password=*** 'https://u:***@h/x?token=***&y=2'"),
    (f"docker login -u a -p {S} r", "docker login -u a -p *** r"),
    ("docker run -p 80:80 x", "docker run -p 80:80 x"),
    (f"redis-cli -a {S} get x", "redis-cli -a *** get x"),
    (f"ldapsearch -x -D cn=a -w {S} x", "ldapsearch -x -D cn=a -w *** x"),
    (f"smbclient -U alice%{S} //h/s", "smbclient -U 'alice%***' //h/s"),
    (f"lftp -u a,{S} h", "lftp -u 'a,***' h"),
    (f"openssl enc -aes256 -k {S} -passin pass:{S}", "openssl enc -aes256 -k *** -passin 'pass:***'"),
    (f"zip -P {S} a b", "zip -P *** a b"),
    (f"xfreerdp /u:a /p:{S} /v:h", "xfreerdp /u:a '/p:***' /v:h"),
    (f"sqlplus scott/{S}@db @x.sql", "sqlplus 'scott/***@db' @x.sql"),
    (f"nmcli dev wifi connect net password {S}", "nmcli dev wifi connect net password ***"),
    (f"aws configure set aws_secret_access_key {S}", "aws configure set aws_secret_access_key ***"),
    (f"vault login {S}", "vault login ***"),
    (f"ssh-keygen -N {S} -f x", "ssh-keygen -N *** -f x"),
    # names within values
    (f"kubectl create secret generic x --from-literal=password={S} --from-literal=a=b",
     "kubectl create secret generic x --from-literal=password=*** --from-literal=a=b"),
    (f"mount -o username=a,password={S},ro //h/s /mnt", "mount -o username=a,password=***,ro //h/s /mnt"),
    (f"git -c 'http.extraHeader=Authorization: Basic {S}' clone x",
     "git -c 'http.extraHeader=Authorization: Basic ***' clone x"),
    # URLs
    (f"git clone https://alice:{S}@github.com/x/y", "git clone https://alice:***@github.com/x/y"),
    (f"git clone https://alice:{S}/{S}@{S}@h/y", None),
    (f"git clone https://{S}{S}{S}{S}@h/y", "git clone https://***@h/y"),
    (f"psql postgresql://u:{S}@h:5432/db", "psql 'postgresql://u:***@h:5432/db'"),
    (f"psql 'host=h password={S} user=u'", "psql 'host=h password=*** user=u'"),
    (f"""psql "host=h password='{S} {S}' user=u" """, '''psql "host=h password=*** user=u"'''),
    ("curl http://h:8080/a@b ssh://git@h/x", "curl http://h:8080/a@b ssh://git@h/x"),
    # by their shape
    (f"x ghp_{'a1' * 15}", "x ***"),
    (f"x eyJ{'a' * 20}.{'b' * 20}.{'c' * 20}", "x ***"),
    # command lines in arguments: the commands stay
    (f"sh -c 'PGPASSWORD={S} psql -h db; mysql -p{S} db'", "sh -c 'PGPASSWORD=*** psql -h db; mysql -p*** db'"),
    (f"""bash -lc "curl -u a:{S} -H 'Authorization: Bearer {S}' x | sh" """,
     """bash -lc "curl -u a:*** -H 'Authorization: Bearer ***' x | sh\""""),
    (f"ssh h mysql -p{S}", "ssh h mysql -p***"),
    (f"ssh h 'mysql -p{S} x'", "ssh h 'mysql -p*** x'"),
    (f"""su -c 'sh -c "mysql -p{S} x"' a""", """su -c 'sh -c "mysql -p*** x"' a"""),
]  # fmt: skip


@pytest.mark.parametrize(("line", "shown"), SHOWN, ids=[line for line, _ in SHOWN])
def test_what_is_recorded_of_a_command_line(line: str, shown: str | None) -> None:
    argv = shlex.split(line)
    found = MASKS.argv("/usr/bin/" + argv[0].rpartition("/")[2], argv, 256)
    assert S not in " ".join(found)
    if shown is not None:
        assert list(found) == shlex.split(shown)
    assert MASKS.argv(argv[0], found, 256) == found, "what is hidden stays as it is"
    assert len(found) == len(argv)


def test_the_program_is_what_runs_whatever_it_is_called() -> None:
    assert MASKS.argv("/usr/bin/mysql", ["x", f"-p{S}"], 256) == ("x", "-p***")
    assert MASKS.argv("/opt/x", ["mysql", f"-p{S}"], 256) == ("mysql", "-p***")


def test_an_operators_own_rules() -> None:
    masks = Masks(["--pin", "LICENCE", "mytool -z", "other -q:"])
    argv = ["mytool", "--pin", "1234", "--pin=1234", "LICENCE=x", "-z", S, f"-z{S}", "licence: x"]
    assert masks.argv("", argv, 256) == (
        "mytool", "--pin", "***", "--pin=***", "LICENCE=***", "-z", "***", "-z***", "licence: ***",
    )  # fmt: skip
    assert masks.argv("", ["other", "-q", f"a:{S}"], 256) == ("other", "-q", "a:***")
    assert masks.argv("", ["mysql", f"-p{S}"], 256) == ("mysql", "-p***"), "beside those that are shipped"
    for wrong in ("", " ", "a b c", "mytool", "--x y", "mytool  -z", "tool --", "é", "a" * 65, "tool /", "x\n"):
        if wrong != "mytool":
            with pytest.raises(MaskError, match="expected an option like"):
                Masks([wrong])


def test_any_text_is_as_long_as_it_may_be_and_hidden_once() -> None:
    chance = random.Random(4)  # noqa: S311 - the same each time
    pieces = [
        "--password", "-p", "=", ":", "@", "://", "mysql", "curl", " ", "'", '"', "\\", "\x00", "\udcff", "é", "u",
        "Authorization", "Bearer", "token", "{", "}", "&", "-c", "-u", "***", "pass:", "/", "login", "\n", "x" * 90,
        "ghp_" + "a" * 30,
    ]  # fmt: skip
    for _ in range(4000):
        argv = ["".join(chance.choices(pieces, k=chance.randrange(8))) for _ in range(chance.randrange(1, 6))]
        found = MASKS.argv(argv[0], argv, 5000)
        assert len(found) == len(argv)
        assert MASKS.argv(argv[0], found, 5000) == found, argv
        assert all(len(word) <= 40 for word in some(MASKS.argv(argv[0], argv, 40)))


def test_a_secret_that_is_longer_than_what_is_looked_at_is_hidden_whole() -> None:
    for argv in (
        ["git", "clone", "https://u:" + S * 4000],
        ["x", "--password=" + S * 4000],
        ["curl", "-u", "a:" + S * 4000],
        ["sh", "-c", "mysql -p" + S * 4000],
        ["sh", "-c", "mysql '-p" + S * 4000],
        ["curl", "-d", '{"password": "' + S * 4000],
    ):
        assert S not in "".join(MASKS.argv("", argv, 256)), argv[:2]


def test_what_is_left_of_a_command_line_of_too_many_words_is_hidden() -> None:
    (found,) = MASKS.argv("", ["token " + "x " * 300 + S], 4096)
    assert S not in found
    shown = MASKS.argv("", ["sh", *["mysql " + "x " * 240] * 8, f"mysql -p{S} x"], 256)
    assert S not in " ".join(shown)
    assert len(shown[1]) == 256
    assert shown[2:] == (HIDDEN,) * 8


@pytest.mark.parametrize(
    "text",
    [
        "a" * MAX, "-" * MAX, "a=" * MAX, "://" * MAX, "://a:" * MAX, "@" * MAX, '"a":' * MAX, '"' * MAX,
        "password" * MAX, " " * MAX, "' \"" * MAX, "mysql -p " * MAX, "eyJ" * MAX, "://u:" + "@" * MAX,
        "token token" * MAX, '"\\' * MAX,
        "://a:@" * MAX, "a=a" * MAX, "a." * MAX, "\\" * MAX, "://a/" * 700 + " @",
    ],
    ids=lambda text: str(text[:9]),
)  # fmt: skip
def test_no_text_takes_long(text: str) -> None:
    began = time.thread_time()
    for _ in range(4):
        MASKS.argv("", ["x", "password", text, HIDDEN], 256)
    assert time.thread_time() - began < 0.4


def test_no_record_and_no_denial_of_a_gated_shell_has_it(gated: Run, agent: Path) -> None:
    home = agent.parent.parent
    words = f"--password={S} https://u:{S}@h/"
    done = gated(f"ls {words}; strace {words}; persona denials")
    assert "strace '--password=***' 'https://u:***@h/'" in done.stdout
    assert S not in done.stdout

    def records() -> list[str]:
        return [body for body in map(json.dumps, audited(home)) if "https://u:" in body]

    deadline = time.monotonic() + 10
    while len(records()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {"granted", "denied"} <= {
        word for body in records() for word in ("granted", "denied") if f'"{word}"' in body
    }
    kept = [path for path in home.rglob("*") if path.is_file() and "bin" not in path.parts]
    assert any(path.suffix == ".records" and b"https://u:***@h/" in path.read_bytes() for path in kept)
    assert [path for path in kept if S.encode() in path.read_bytes()] == []
