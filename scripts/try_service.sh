#!/bin/bash
# Tries the Debian package under a systemd of its own: scripts/try_service.sh [FILE.deb [SYSTEMD.deb...]]
# With the packages of another systemd it is tried under that one (apt-get download systemd libsystemd-shared libsystemd0 libudev1).
# Install, start, forward, reload, upgrade, crash and death of all processes under traffic, stop, remove, purge. Systemd runs in its own namespaces, on an
# overlay of this machine's file system that is memory only: nothing outside of it is touched, and all of it ends with this script.
# Needs root, systemd, unshare, overlayfs, a cgroup file system. Exit codes: 0 passed, 1 failed, 2 can't be tried here.
set -eu
here=$(cd "$(dirname "$0")/.." && pwd)
package=${1:-$(ls -t "${CARGO_TARGET_DIR:-$here/target}"/debian/relay_*.deb 2>/dev/null | head -1)}
cannot() { echo "try_service.sh: $1" >&2; exit 2; }
[ "$(id -u)" = 0 ] || cannot "needs root"
[ -f "$package" ] || cannot "no package: make it with scripts/deb.sh"
[ -x /lib/systemd/systemd ] || cannot "needs systemd (apt-get install systemd)"
base=$(mktemp -d)
trap 'rm -rf --one-file-system "$base"' EXIT
cp "$package" "$base/relay.deb"
mkdir "$base/systemd"
if [ $# -gt 1 ]; then cp "${@:2}" "$base/systemd/"; fi

# The machine: systemd as process 1 of a new PID namespace, on an overlay.
cat > "$base/machine" <<'END'
set -e
base=$1
mount --make-rprivate /
mkdir "$base/memory"
mount -t tmpfs tmpfs "$base/memory"
mkdir "$base/memory/upper" "$base/memory/work" "$base/memory/root"
mount -t overlay -o "lowerdir=/,upperdir=$base/memory/upper,workdir=$base/memory/work" overlay "$base/memory/root"
cd "$base/memory/root"
# /lib is a link to /usr/lib, and stays one.
for package in "$base"/systemd/*.deb; do
    if [ -f "$package" ]; then dpkg-deb --fsys-tarfile "$package" | tar -x --keep-directory-symlink; fi
done
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t bpf bpf sys/fs/bpf
if grep -q ' /sys/fs/cgroup cgroup2 ' /proc/mounts; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
else
    mount -t tmpfs tmpfs sys/fs/cgroup
    mkdir sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
fi
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm
for node in null zero full random urandom tty; do cp -a "/dev/$node" "dev/$node"; done
mount -t devpts devpts dev/pts
ln -s pts/ptmx dev/ptmx
mkdir try
mount --bind "$base" try
rm -f etc/systemd/system/*.wants/* # nothing of this machine's own is started
ln -s /try/try.service etc/systemd/system/try.service
mkdir old
pivot_root . old
umount -l /old
exec env -i container=try PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=try.service --log-target=journal
END

cat > "$base/try.service" <<'END'
[Unit]
Requires=systemd-journald.service
After=systemd-journald.service
[Service]
Type=oneshot
ExecStart=/bin/bash /try/steps
ExecStopPost=/bin/bash -c 'journalctl --unit relay --no-pager > /try/journal; echo $EXIT_STATUS > /try/status; systemctl exit'
StandardOutput=append:/try/output
StandardError=append:/try/output
END

# What is tried. A step that fails ends the machine; its name is the last line.
cat > "$base/steps" <<'END'
set -eu
step() { echo "· $*"; }
fail() { echo "FAILED: $*"; exit 1; }
inside() { ip netns exec "$@"; }
# A stream through the relay: stream PACKETS COMMAND..., the command while it runs. Nothing may be lost.
stream() {
    local count=$1; shift
    inside receiver relay recv --iface r1 --group 239.9.9.9:6000 --count "$count" --timeout 15s --json > /try/heard & local receiver=$!
    sleep 0.5
    inside sender relay send --iface s1 --to 239.1.1.1:5000 --rate 1000 --count "$count" --json > /try/sent & local sender=$!
    sleep 1
    "$@"
    wait "$sender" || fail "the sender: $(cat /try/sent)"
    wait "$receiver" || fail "the receiver: $(cat /try/heard)"
}
main_pid() { systemctl show --property MainPID --value relay; }
await() { # await WHAT COMMAND...: within ten seconds
    local what=$1; shift
    for _ in $(seq 100); do if "$@"; then return 0; fi; sleep 0.1; done
    fail "$what"
}
another() { local pid; pid=$(main_pid); [ "$pid" != 0 ] && [ "$pid" != "$1" ] && relay status > /dev/null 2>&1; }

ip link set lo up
for side in sender:s receiver:r; do
    name=${side%:*}; link=${side#*:}
    ip netns add "$name"
    ip link add "${link}0" type veth peer name "${link}1" netns "$name"
    ip link set "${link}0" up
    inside "$name" ip link set "${link}1" up
    inside "$name" ip link set lo up
done
ip addr add 10.1.0.1/24 dev s0; inside sender ip addr add 10.1.0.2/24 dev s1
ip addr add 10.2.0.1/24 dev r0; inside receiver ip addr add 10.2.0.2/24 dev r1

step "install: $(systemctl --version | head -1)"
export DEBIAN_FRONTEND=noninteractive
dpkg --install /try/relay.deb > /try/dpkg 2>&1 || fail "$(cat /try/dpkg)"
id relay > /dev/null && id relay-worker > /dev/null || fail "no users"
systemctl --quiet is-active relay && fail "an installation has started the relay"
man --where relay > /dev/null 2>&1 || [ -f /usr/share/man/man1/relay.1.gz ] || echo "  (manual pages are left out by this machine's dpkg)"

step "start"
cat > /etc/relay/relay.toml <<CONFIG
version = 1
[[rule]]
id = "first"
ingress = "s0"
match = "239.1.1.1:5000"
[[rule.output]]
egress = "r0"
to = "239.9.9.9:6000"
CONFIG
chmod 0644 /etc/relay/relay.toml
relay check /etc/relay/relay.toml > /dev/null
systemctl start relay || fail "start: $(systemctl status --no-pager --full relay)"
relay status > /dev/null || fail "no answer after start: READY came too early"
[ "$(ps -o user= -p "$(main_pid)")" = relay ] || fail "the supervisor is not user relay"

step "forward"
stream 2000 true

step "reload"
cat >> /etc/relay/relay.toml <<CONFIG
[[rule]]
id = "second"
ingress = "s0"
match = "239.1.1.2:5000"
[[rule.output]]
egress = "r0"
CONFIG
systemctl reload relay || fail "reload"
await "the second rule after a reload" sh -c 'relay rule list --json | grep -q second'
cp /etc/relay/relay.toml /try/good
echo 'version = 9' > /etc/relay/relay.toml
systemctl reload relay || true
sleep 0.5
relay rule list --json | grep -q second || fail "a bad file has changed the rules"

step "crash of the supervisor under traffic, with a file that is broken"
before=$(main_pid)
stream 5000 kill -KILL "$before"
another "$before" || fail "no successor: $(systemctl status relay)"
cat /try/good > /etc/relay/relay.toml
systemctl reload relay || fail "reload by the successor"

step "upgrade under traffic"
before=$(main_pid)
dpkg-deb --raw-extract /try/relay.deb /try/newer
sed -i 's/^Version: .*/&+1/' /try/newer/DEBIAN/control
dpkg-deb --build /try/newer /try/newer.deb > /dev/null
stream 6000 dpkg --force-confold --install /try/newer.deb > /try/dpkg 2>&1 || fail "$(cat /try/dpkg)"
await "a successor after the upgrade" another "$before"
relay rule list --json | grep -q second || fail "the upgrade has lost a rule"

step "every process is killed at once under traffic"
kept() { systemctl show --property NFileDescriptorStore --value relay; }
[ "$(kept)" -gt 10 ] || fail "the service manager keeps $(kept) descriptors"
before=$(main_pid)
stream 6000 systemctl kill --signal=KILL --kill-whom=all relay
another "$before" || fail "no successor: $(systemctl status relay)"
journalctl --unit relay --output cat --no-pager "_PID=$(main_pid)" > /try/heir
grep 'relay taken over' /try/heir | grep -q 'service manager' || fail "not from what the service manager has kept: $(cat /try/heir)"
relay rule list --json | grep -q second || fail "a rule is lost"
echo "  of $(kept) descriptors"

step "journal"
journalctl --unit relay --output json --no-pager > /try/json
grep -q '"RELAY_WORKER":"0"' /try/json || fail "no fields: $(tail -1 /try/json)"
journalctl --unit relay --output cat --no-pager RELAY_TARGET=relay::supervisor::fleet | grep -q 'worker forwards worker=0' || fail "no entry of a worker"

step "stop"
systemctl stop relay || fail "stop"
[ "$(systemctl show --property Result --value relay)" = success ] || fail "stop: $(systemctl status relay)"
pgrep -x relay > /dev/null && fail "processes left: $(pgrep -ax relay)"
[ "$(kept)" = 0 ] || fail "the service manager still keeps $(kept) descriptors"
ip link show s0 | grep -q xdp && fail "an XDP program is left"

step "remove while it runs"
cp /usr/share/doc/relay/README.md /try/readme
printf 'version = 1\n' > /etc/relay/relay.toml
systemctl enable relay 2> /dev/null
systemctl start relay || fail "start again"
dpkg --remove relay > /try/dpkg 2>&1 || fail "$(cat /try/dpkg)"
pgrep -x relay > /dev/null && fail "processes left after removal"
[ -f /etc/relay/relay.toml ] || fail "a removal has taken the configuration"

step "purge"
dpkg --purge relay > /try/dpkg 2>&1 || fail "$(cat /try/dpkg)"
left=$(find /etc /usr /lib /var/lib /run -name '*relay*' ! -path '/var/lib/dpkg/*' ! -path '/usr/share/doc/*' -newer /try/try.service 2>/dev/null || true)
[ -z "$left" ] || fail "left behind: $left"
echo "PASS"
END

: > "$base/output"
timeout --signal=KILL 180 unshare --mount --pid --fork --kill-child --uts --ipc --net --cgroup \
    /bin/bash "$base/machine" "$base" > "$base/console" 2>&1 || true
cat "$base/output"
if [ "$(tail -1 "$base/output")" = PASS ]; then exit 0; fi
echo "--- console" >&2; tail -20 "$base/console" >&2
echo "--- journal of the relay" >&2; tail -40 "$base/journal" >&2 || true
exit 1
