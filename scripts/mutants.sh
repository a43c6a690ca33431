#!/usr/bin/env bash
# Injects known bugs into a copy of the shared-memory rooms, one at a time; each must be killed by the test it names.
# Usage: scripts/mutants.sh [--list] [NAME]...      (takes minutes; never touches the working tree)
# Exit: 0 all killed, 1 a mutant survived or a mutation no longer applies, 2 bad usage.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
unit_target=${CARGO_TARGET_DIR:-$root/target}

# name ~ file in relay/src ~ old text ~ new text ~ loom|unit ~ the test that kills it
mutants=$(cat <<'LIST'
publish-relaxed~ring/spsc.rs~self.view.producer().store(self.published, Ordering::Release)~self.view.producer().store(self.published, Ordering::Relaxed)~loom~req_002_2_elements_arrive_whole
release-relaxed~ring/spsc.rs~self.view.consumer().store(self.released, Ordering::Release)~self.view.consumer().store(self.released, Ordering::Relaxed)~loom~req_002_2_elements_arrive_whole
producer-acquire-relaxed~ring/spsc.rs~let consumer = self.view.consumer().load(Ordering::Acquire)~let consumer = self.view.consumer().load(Ordering::Relaxed)~loom~req_002_2_elements_arrive_whole
consumer-acquire-relaxed~ring/spsc.rs~let producer = self.view.producer().load(Ordering::Acquire)~let producer = self.view.producer().load(Ordering::Relaxed)~loom~req_002_2_elements_arrive_whole
capacity-off-by-one~ring/cursor.rs~size.saturating_sub(filled(producer, consumer))~(size + 1).saturating_sub(filled(producer, consumer))~unit~req_000_8_the_ring_is_a_queue
one-slot-wasted~ring/cursor.rs~size.saturating_sub(filled(producer, consumer))~(size - 1).saturating_sub(filled(producer, consumer))~unit~req_002_12_exactly_capacity
unmasked-index~ring/cursor.rs~(index & (size - 1)) as usize~(index & size) as usize~unit~cursor_arithmetic_holds
not-wrapping~ring/cursor.rs~producer.wrapping_sub(consumer)~producer.saturating_sub(consumer)~unit~cursor_arithmetic_holds
publish-before-write~ring/spsc.rs~        self.write(0, value);\n        self.publish(1);~        self.publish(1);\n        self.view.cell(self.published.wrapping_sub(1)).with_mut(|slot| unsafe { slot.write(value) });~loom~req_002_2_elements_arrive_whole
believes-the-peer~ring/spsc.rs~        if depth > self.view.capacity {~        if depth == u32::MAX {~unit~req_002_17_an_impossible_peer_index
resets-on-attach~ring/spsc.rs~        let (published, cached_consumer) = view.indices()?;~        let (published, cached_consumer) = (0, view.indices()?.1);~unit~successors_continue
missing-recheck~ring/sleep.rs~        if !has_work() {~        let _ = has_work; {~loom~req_001_5_the_sleeper
sleeper-without-fence~ring/sleep.rs~        self.set((self.last | 1).wrapping_add(2));\n        fence(Ordering::SeqCst);~        self.set((self.last | 1).wrapping_add(2));~loom~req_001_5_the_sleeper
waker-without-fence~ring/sleep.rs~        fence(Ordering::SeqCst);\n        let seen~        let seen~loom~req_001_5_the_sleeper
broadcast-writer-without-fence~ring/broadcast.rs~        fence(Ordering::Release);\n        store(words, value);~        store(words, value);~loom~req_000_2_a_reader_sees_whole
broadcast-reader-without-fence~ring/broadcast.rs~        fence(Ordering::Acquire);\n        if before~        if before~loom~req_000_2_a_reader_sees_whole
broadcast-stamp-relaxed~ring/broadcast.rs~stamp.store(number.wrapping_mul(2), Ordering::Release)~stamp.store(number.wrapping_mul(2), Ordering::Relaxed)~loom~req_000_2_a_message_that_is_announced
broadcast-unordered~ring/broadcast.rs~fence(Ordering::Release);\n        store(words, value);\n        stamp.store(number.wrapping_mul(2), Ordering::Release)~store(words, value);\n        stamp.store(number.wrapping_mul(2), Ordering::Relaxed)~loom~req_000_2_a_message_that_is_announced
broadcast-no-second-look~ring/broadcast.rs~before != expected || stamp.load(Ordering::Relaxed) != expected~before != expected~loom~req_000_2_a_reader_sees_whole
broadcast-miscounts~ring/broadcast.rs~let lost = next.wrapping_sub(self.next);~let lost = next.wrapping_sub(self.next) - 1;~unit~req_000_2_received_and_lost
gate-off-by-one~ring/broadcast.rs~        if behind.messages < capacity {~        if behind.messages <= capacity {~unit~req_000_2_a_gate_loses_nothing
gate-forgets-a-reader~ring/gate.rs~messages > found.messages~messages < found.messages~unit~req_000_2_a_gate_loses_nothing
lock-shared~shm/channel.rs~Err(Errno::EAGAIN | Errno::EACCES) => Ok(None)~Err(Errno::EAGAIN | Errno::EACCES) => Ok(Some(Self(own)))~unit~req_000_1_second_writer
moves-before-drained~worker/partition.rs~if free { Route::To(new) } else { Route::Hold }~if free { Route::To(new) } else { Route::To(new) }~unit~req_003_5_a_flow_keeps_its_order
LIST
)

selected() { [ $# -eq 1 ] || { local name=$1; shift; for want in "$@"; do [ "$want" = "$name" ] && return 0; done; return 1; }; }

if [ "${1:-}" = "--list" ]; then cut -d'~' -f1,5,6 --output-delimiter='	' <<<"$mutants"; exit 0; fi
for want in "$@"; do
  grep -q "^$want~" <<<"$mutants" || { echo "mutants: no mutant named $want: see --list" >&2; exit 2; }
done

copy=$(mktemp -d)
# The model checker's crate takes its files from outside its own folder, and cargo knows those by absolute path: a target directory that
# another checkout has filled would look fresh, and every mutant would survive.
loom_target=$copy/target/loom
trap 'rm -rf "$copy"' EXIT
git ls-files -co --exclude-standard -z | tar --null -T - -cf - | tar -xf - -C "$copy"

run() { # runner, test
  if [ "$1" = loom ]; then
    (cd "$copy" && CARGO_TARGET_DIR=$loom_target RUSTFLAGS="--cfg loom" timeout 300 cargo test -q -p relay-loom --release -- "$2")
  else
    (cd "$copy" && CARGO_TARGET_DIR=$unit_target RELAY_CRASH_ROUNDS=5 timeout 300 cargo test -q -p relay --lib -- "$2")
  fi
}

survived=0 killed=0
while IFS='~' read -r name file old new runner test; do
  selected "$name" "$@" || continue
  target=$copy/relay/src/$file
  cp "$root/relay/src/$file" "$target"
  # A mutant that does not compile proves nothing, and one whose test passes on the original neither: both are checked below.
  if ! OLD=$(printf '%b' "$old") NEW=$(printf '%b' "$new") perl -0pi -e 'BEGIN { $count = 0 } $count += s/\Q$ENV{OLD}\E/$ENV{NEW}/; END { exit($count == 1 ? 0 : 1) }' "$target"; then
    echo "STALE     $name: the text to mutate is no longer in $file"; survived=$((survived + 1)); continue
  fi
  if output=$(run "$runner" "$test" 2>&1); then
    echo "SURVIVED  $name ($test passed, or no test of that name ran)"; survived=$((survived + 1))
  elif ! grep -q "test result: FAILED\|panicked at\|SIG\|timed out" <<<"$output"; then
    echo "BROKEN    $name: did not compile"; tail -5 <<<"$output"; survived=$((survived + 1))
  else
    echo "killed    $name by $test"; killed=$((killed + 1))
  fi
  cp "$root/relay/src/$file" "$target"
done <<<"$mutants"
echo "$killed killed, $survived not"
[ "$survived" -eq 0 ]
