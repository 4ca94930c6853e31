//! IPv6 through `tp run`: a network that has nothing else, behind a manager without Kubernetes, since the test cluster is
//! IPv4 only. Everything is in namespaces that end with the script.

use std::os::unix::fs::{PermissionsExt as _, chown};
use std::process::Command;
use std::time::Duration;

use tp_tests::laptop::binary;
use tp_tests::{Cluster, Run};

const UID: u32 = 65_534;

/// Two networks joined by a link. `$1` holds homes and files; `tp`, `tp-manager` and `probe` are in `$PATH`. The program
/// is run as an unprivileged user.
const SCRIPT: &str = r#"
set -eu
cd "$1"
until_ok() { for _ in $(seq 200); do "$@" > /dev/null 2>&1 && return; sleep 0.05; done; echo "waited for: $*" >&2; exit 1; }
ip link set lo up
unshare --net --mount sleep infinity & shop=$!
apart() { [ "$(readlink /proc/$shop/ns/net)" != "$(readlink /proc/self/ns/net)" ]; }
until_ok apart
in_shop() { nsenter -t "$shop" -n -m "$@"; }
ip link add to-shop type veth peer name eth0 netns "$shop"
ip -6 addr add fd10:1::1/64 dev to-shop nodad; ip link set to-shop up
in_shop ip link set lo up
in_shop ip -6 addr add fd10:1::2/64 dev eth0 nodad; in_shop ip link set eth0 up
in_shop ip -6 addr add fd10:20::10/128 dev lo nodad
printf '::1 localhost\nfd10:20::10 orders.shop.internal\n' > hosts
in_shop mount --bind "$PWD/hosts" /etc/hosts
in_shop probe serve &
until_ok in_shop curl -s -g -o /dev/null 'http://[fd10:20::10]/'
as_user() { setpriv --reuid 65534 --regid 65534 --clear-groups --bounding-set=-all --inh-caps=-all -- env -i HOME="$PWD/home" XDG_RUNTIME_DIR="$PWD/run" PATH="$PATH" LANG=C.UTF-8 "$@"; }
as_user tp key new --file "$PWD/home/key.pem" > authorized-keys
in_shop tp-manager --standalone --listen '[fd10:1::2]:8443' --key "$PWD/manager.pem" --authorized-keys "$PWD/authorized-keys" --suffix shop.internal --range fd10:20::/64 > manager.log 2>&1 &
until_ok grep -q 'sha256:[0-9a-f]\{64\}' manager.log
manager_key=$(grep -o 'sha256:[0-9a-f]\{64\}' manager.log | head -1)
as_user sh -c 'test "$(id -u)" != 0'
as_user tp run --via '[fd10:1::2]:8443' --key "$PWD/home/key.pem" --manager-key "$manager_key" -- sh -c '
  curl -sS --fail -m 20 http://orders.shop.internal/
  curl -sS --fail -m 20 -g "http://[fd10:20::10]/hostname" > /dev/null && echo by address
  dig +short aaaa orders.shop.internal
  dig a orders.shop.internal | grep -o "status: NOERROR\|ANSWER: 0"
  probe ring "[fd10:20::10]:7" 3000000
  ping -6 -c 1 -W 10 fd10:20::10 | grep -o "1 received"
  python3 client.py'
"#;

const CLIENT: &str = r#"
import hashlib, os, socket
def reach(kind, port):
    s = socket.socket(socket.AF_INET6, kind)
    s.settimeout(20)
    s.connect(("orders.shop.internal", port))
    return s
s = reach(socket.SOCK_DGRAM, 7)
for size in (0, 1200, 60000):
    sent = os.urandom(size)
    s.send(sent)
    print(size, s.recv(70000) == sent)
s = reach(socket.SOCK_STREAM, 9)
sent = os.urandom(4000000)
s.sendall(sent)
s.shutdown(socket.SHUT_WR)
answer = b"".join(iter(lambda: s.recv(4096), b"")).decode().strip()
print("half-close", answer == "4000000 " + hashlib.sha256(sent).hexdigest())
for port, name in ((81, "refused"), (14, "reset")):
    try:
        s = reach(socket.SOCK_STREAM, port)
        s.sendall(b"x")
        while s.recv(100):
            pass
        print(name, "FIN")
    except OSError as error:
        print(name, type(error).__name__)
"#;

#[test]
fn a_network_of_ipv6_alone_is_reached() {
    // Only for root, which namespaces and mounts want.
    let Some(_cluster) = Cluster::shared() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let open = |mode| std::fs::Permissions::from_mode(mode);
    std::fs::set_permissions(folder.path(), open(0o711)).expect("our folder");
    for own in ["home", "run"] {
        let path = folder.path().join(own);
        std::fs::create_dir(&path).expect("our folder");
        std::fs::set_permissions(&path, open(0o700)).expect("our folder");
        chown(&path, Some(UID), Some(UID)).expect("we are root");
    }
    // Where the user is when it starts `tp`.
    std::fs::write(folder.path().join("client.py"), CLIENT).expect("our folder");
    let programs = ["tp", "tp-manager", "probe"].map(|name| {
        let path = binary(name);
        path.rsplit_once('/')
            .expect("an absolute path")
            .0
            .to_owned()
    });
    let path = format!(
        "{}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        programs.join(":")
    );
    let mut command = Command::new("unshare");
    command
        .args([
            "--net",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .args(["bash", "-c", SCRIPT, "bash"])
        .arg(folder.path())
        .env("PATH", path);

    let run = Run::new(command, b"", Duration::from_secs(60)).ok();

    assert_eq!(
        run.out(),
        "hello-from-probe\nby address\nfd10:20::10\nstatus: NOERROR\nANSWER: 0\n{\"echoed\":3000000}\n1 received\n\
         0 True\n1200 True\n60000 True\nhalf-close True\nrefused ConnectionRefusedError\nreset ConnectionResetError\n",
        "{}",
        run.report()
    );
}
