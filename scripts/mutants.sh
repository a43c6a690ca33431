#!/usr/bin/env bash
# Injects known bugs into a copy, one at a time; each must be killed by the test it names. loom and unit: the shared-memory rooms. ns: a
# protection of docs/reliability.md taken out of the program, which the working tree's own namespace test is then given (root). lib: the
# same for a test that calls the library itself.
# Usage: scripts/mutants.sh [--list] [--together] [NAME]...      (takes minutes; never touches the working tree)
#   --together: all the ns mutants named in one program, to save builds. Name those alone whose tests do not meet each other's.
# Exit: 0 all killed, 1 a mutant survived or a mutation no longer applies, 2 bad usage.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
unit_target=${CARGO_TARGET_DIR:-$root/target}

# name ~ file in relay/src ~ old text ~ new text ~ loom|unit|ns:FILE or lib:FILE of tests/tests ~ the test that kills it
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
lock-shared~shm/channel.rs~Err(Errno::EAGAIN | Errno::EACCES) => false~Err(Errno::EAGAIN | Errno::EACCES) => true~unit~req_000_1_second_writer
moves-before-drained~worker/partition.rs~if free { Route::To(new) } else { Route::Hold }~if free { Route::To(new) } else { Route::To(new) }~unit~req_003_5_a_flow_keeps_its_order
blocked-output-stops-the-rule~datapath/ingress.rs~let Some((last, others)) = rule.outputs.split_last() else { return };~let Some((last, others)) = rule.outputs.split_last() else { return };\n        if rule.outputs.iter().any(|output| (self.staging.room(output.port) as usize) < fragments.len()) {\n            return;\n        }~ns:surroundings~an_output_that_is_blocked_costs_the_others_nothing::xsk_fused
interface-not-followed~supervisor/ports.rs~gone.contains(&self.facts.ifindex) || known.get(&self.name).is_none_or(~gone.contains(&u32::MAX) && known.get(&self.name).is_none_or(~ns:surroundings~a_namespace_that_is_removed_takes_only_its_own_output
restarts-at-leisure~supervisor/backoff.rs~return Restart { after: Duration::ZERO, degraded: false };~return Restart { after: Duration::from_secs(20), degraded: false };~ns:surroundings~a_worker_without_memory_is_replaced_and_nothing_is_lost
overload-miscounted~supervisor/report.rs~more(&mut taken, statistics.rx_dropped + statistics.rx_ring_full);~more(&mut taken, 0);~ns:overload~an_overload_is_accounted_for_and_leaves_nothing_behind::xsk_fused
why-sees-no-early-drops~doctor/why.rs~.filter(|(reason, _)| reason != "no_rule")~.filter(|(reason, _)| reason == "no_rule")~ns:why~packets_that_no_rule_sees
why-sees-no-dead-worker~doctor/why.rs~.filter(|worker| worker.state != "run")~.filter(|worker| worker.state == "gone")~ns:inner_faults~a_crash_loop_is_named_and_costs_other_rules_nothing
never-degraded~supervisor/backoff.rs~self.degraded |= self.deaths.is_full()~self.degraded |= self.deaths.is_empty()~ns:inner_faults~a_crash_loop_is_named_and_costs_other_rules_nothing
memory-to-lock-unnamed~nic/afxdp/create.rs~register the UMEM (RLIMIT_MEMLOCK, CAP_IPC_LOCK)~register the UMEM~ns:inner_faults~no_memory_to_lock_is_said_at_the_start
circle-accepted~rule/cycle.rs~(0..rules.len()).find_map(~(0..0).find_map(~ns:loops~a_circle_is_refused::xsk_fused
loop-unsuspected~supervisor/loops.rs~now.expired <= before.expired ||~now.expired >= before.expired ||~ns:loops~two_relays_end_by_ttl::xsk_fused
lost-lines-untold~cli/logs.rs~format!("relay: {lost} log lines lost~format!("relay: {lost} more~ns:faults~a_stopped_log_reader_costs_lines_and_no_packet
full-disk-ends-it~cli/logs.rs~self.0.write_all(piece).is_ok()~self.0.write_all(piece).map_err(|error| if error.raw_os_error() == Some(28) { std::process::abort() }).is_ok()~ns:faults~a_log_on_a_full_disk_costs_no_packet
length-believed~control/framing.rs~self.document_len = checked_len(len.into(), self.limit)? as usize;~self.document_len = len as usize;\n        self.document = vec![1; self.document_len.min(1 << 24)];\n        self.document.clear();~ns:faults~a_flood_of_clients_costs_no_packet_and_little_memory
hang-unseen~shm/heartbeat.rs~if silent < self.timeout.saturating_add(self.grace)~if silent < self.timeout.saturating_add(self.grace).saturating_mul(100)~ns:liveness~req_004_5_a_stopped_worker_is_found_within_300_ms
worker-call-allowed~worker/sandbox.rs~SeccompAction::KillProcess, SeccompAction::Allow~SeccompAction::Log, SeccompAction::Allow~ns:sandbox~a_stray_call_kills_the_worker_which_is_replaced_and_counted
supervisor-call-allowed~supervisor/sandbox.rs~SeccompAction::Errno(libc::ENOSYS.cast_unsigned())~SeccompAction::Log~ns:sandbox~a_stray_call_of_the_supervisor_is_refused
broken-file-is-empty~supervisor/engine.rs~let loaded = load(&self.options);~let loaded = load(&self.options).or_else(|_| Ok::<_, RunError>(RuleSet::default()));~ns:reload~sighup_with_a_file_cut_off_changes_nothing
batch-not-redone~datapath/recover.rs~if self.journal.attempt() >= MAX_ATTEMPTS {~if self.journal.attempt() > 0 {\n            return 0;\n        }\n        if self.journal.attempt() >= MAX_ATTEMPTS {~ns:single_step~fused_one_output
poison-tried-for-ever~datapath/recover.rs~self.journal.poison_at_cursor();~~ns:poison~a_batch_that_kills_its_workers
keeper-not-replaced~supervisor/keeping.rs~(self.process, self.due) = (None, true);~(self.start_at, self.due) = (now + Duration::from_secs(3600), true);~ns:takeover~a_stop_takes_the_keeper_along_and_a_dead_keeper_is_replaced
list-not-last~keeper/store.rs~        wanted.insert(self.add(LIST, memo::write("relay-list", &text)?)?);~        self.remove(|name| !wanted.contains(name));\n        wanted.insert(self.add(LIST, memo::write("relay-list", &text)?)?);~unit~wherever_a_change_ends_the_table_is_the_one_before_or_the_one_after
store-not-read~supervisor/takeover.rs~(None, Some(store)) if stored > 0 =>~(None, Some(store)) if stored == usize::MAX =>~ns:store~everybody_is_killed_and_no_packet_is_lost
store-not-emptied~supervisor/engine.rs~        self.empty_store();\n~~ns:store~everybody_is_killed_and_no_packet_is_lost
keeper-serves-anybody~keeper/process.rs~peer.uid() == 0 || peer.uid() == self.uid~peer.uid() != u32::MAX~ns:privileges~another_user_is_refused_whatever_the_modes_of_files
control-serves-anybody~control/server.rs~is_permitted(uid, self.own_uid)~is_permitted(0, uid)~ns:privileges~another_user_is_refused_whatever_the_modes_of_files
held-frames-forgotten~datapath/recover.rs~for frame in held.iter().filter(~for frame in held.iter().take(0).filter(~ns:worker_death~packet_loses_at_most_what_the_ring_held
sent-before-marked~datapath/egress.rs~    half.publish();\n    port.ring.release(count);\n    fuse::stored();\n    journal.done();\n    count as usize\n}\n\n/// Which half~    half.publish();\n    let _ = half.kick();\n    (0..20_000).for_each(|_| std::hint::spin_loop());\n    port.ring.release(count);\n    fuse::stored();\n    journal.done();\n    count as usize\n}\n\n/// Which half~ns:coalesce~a_killed_worker_sends_nothing_twice::xsk_fused
starved-is-hung~supervisor/fleet/silence.rs~self.0.iter().any(starved)~self.0.is_empty() && self.0.iter().any(starved)~unit~who_is_ready_and_does_not_run_is_starved
spare-stays-seated~worker/spare.rs~Some(State::Halt) && self.take_baton()~Some(State::Halt) && !self.take_baton()~ns:spare~xsk_fused
dead-spare-not-replaced~supervisor/fleet/spare.rs~(None, now + AGAIN);~(None, now + AGAIN * 3600);~ns:spare~a_spare_has_no_privilege_and_may_die_or_hang
hung-spare-waited-for~supervisor/fleet/spare.rs~since.elapsed() > STANDS_IN_WITHIN~since.elapsed() > STANDS_IN_WITHIN * 3600~ns:spare~a_spare_has_no_privilege_and_may_die_or_hang
sums-overflow~supervisor/report.rs~*total = total.saturating_add(by);~*total += by;~ns:inner_faults~a_scribbled_status_segment_harms_neither_supervisor_nor_other_rules
end-unheard~worker/wait.rs~Ok(0) => return Life::Orphaned,~Ok(0) => return Life::Alive,~ns:liveness~req_004_3_no_worker_survives_its_supervisor
workers-not-kept~supervisor/keeping.rs~        self.fleet.keep(&mut entries);\n~~ns:takeover~orphans_forward_on_and_leave_nothing_when_their_time_is_over
linger-for-ever~keeper/process.rs~checked_add(self.linger)~checked_add(self.linger * 100)~ns:takeover~orphans_forward_on_and_leave_nothing_when_their_time_is_over
kernel-path-let-go~supervisor/keeping.rs~if self.keeps_kernel_path() {~if self.keeps_kernel_path() && self.options.linger.is_zero() {~ns:takeover~the_kernel_path_is_kept_until_somebody_ends_it
program-attached-anew~nic/afxdp/program.rs~let link = link::Link::adopt(link, self.program()?, mode)~link::Link::adopt(link, self.program()?, mode).and_then(link::Link::detach).map_err(|errno| attach_error(&before, mode, errno))?;\n        let link = link::Link::create(self.program()?, ifindex, mode)~ns:takeover~a_dead_supervisor_is_succeeded_and_no_packet_notices
counters-begin-anew~supervisor/takeover.rs~self.kernel_path.go_on_counting(handover.counted);~let _ = handover.counted;~ns:takeover~nor_on_the_kernel_path
upgrade-is-a-stop~supervisor/takeover.rs~process::signal(old.as_fd(), Signal::SIGKILL)~process::signal(old.as_fd(), Signal::SIGTERM)~ns:takeover~a_living_supervisor_is_succeeded_and_no_packet_notices
unfit-not-ended~supervisor/takeover.rs~end(keeper).map(|()| None)~{\n                drop(keeper);\n                Ok(None)\n            }~ns:takeover~what_cannot_be_gone_on_with_is_ended_and_started_clean
other-memory-taken~supervisor/takeover.rs~handover.disagreement(options) {~handover.disagreement(options).filter(|_| options.frames == 0) {~ns:takeover~refusals_name_the_remedy_and_change_nothing
bad-rules-taken~supervisor/takeover.rs~filter(|_| !is_orphaned(&keeper))~filter(|_| options.frames == 0)~ns:takeover~a_broken_file_ends_no_orphans
bad-rules-end-orphans~supervisor/takeover.rs~filter(|_| !is_orphaned(&keeper))~filter(|_| options.frames > 0)~ns:takeover~a_broken_file_ends_no_orphans
dead-socket-in-use~control/path.rs~error.kind() == io::ErrorKind::ConnectionRefused =>~error.kind() == io::ErrorKind::NotFound =>~ns:clean_up~after_kill_of_everything_the_next_start_works
socket-left~control/path.rs~            let _ = std::fs::remove_file(&self.path);\n~~ns:clean_up~sigterm_under_load_ends_within_a_second_and_leaves_nothing
stop-not-told~supervisor/engine.rs~        self.fleet.stop_all();\n        let limit = Instant::now() + STOP_LIMIT;~        let limit = Instant::now() + STOP_LIMIT * 3;~ns:clean_up~sigterm_under_load_ends_within_a_second_and_leaves_nothing
back-and-not-opened~supervisor/ports.rs~|| needs.keys().any(waits)~|| needs.is_empty() && needs.keys().any(waits)~ns:interfaces_live~an_egress_interface_is_deleted_and_made_again::xsk_fused
dead-rings-forgotten~datapath/recover.rs~for frame in frames.iter().filter(~for frame in frames.iter().take(0).filter(~ns:interfaces_live~an_ingress_interface_is_deleted_and_made_again::xsk_fused
killed-for-ports~supervisor/fleet.rs~        self.command(COMMAND_DRAIN, true);~        self.kill_all();\n        self.command(COMMAND_DRAIN, true);~ns:interfaces_live~an_ingress_interface_is_deleted_and_made_again::packet
dead-sockets-kept~supervisor/ports.rs~            port.sockets.clear();\n            (port.retired, port.backend~            (port.retired, port.backend~ns:interfaces_live~all_interfaces_are_deleted_and_made_again::packet
news-restart-everybody~supervisor/engine.rs~false => self.replan_outputs(),~false => {\n                self.fleet.replace_all();\n                self.replan_outputs()\n            }~ns:interfaces_live~a_flap_restarts_nobody::xsk_fused
queues-restart-everybody~supervisor/engine.rs~false => self.replan_outputs(),~false => {\n                self.fleet.replace_all();\n                self.replan_outputs()\n            }~ns:surroundings~the_number_of_queues_may_change
outputs-planned-once~supervisor/engine.rs~if snapshot.rules == self.published.rules && snapshot.own == self.published.own {~if snapshot.epoch > 0 {~ns:interfaces_live~mtu_and_address_are_followed::xsk_fused
sockets-not-in-the-map~supervisor/update.rs~        self.take_live()?;\n        self.set_joins(~        self.set_joins(~ns:replan~a_change_of_path_keeps_the_order
down-and-not-blocked~supervisor/view.rs~Some(interface) if interface.up && interface.mac.is_some()~Some(interface) if interface.mac.is_some()~ns:stats_close~an_interface_that_is_down_takes_only_its_own_output::xsk_fused
refused-by-the-driver-unseen~nic/afxdp/sending.rs~            self.settled = before;\n        }\n        self.refuse_one(end)~            self.settled = before;\n        }\n        end == self.settled && self.refuse_one(end)~ns:refusals~what_the_far_end_cannot_take_is_send_failed::xsk_fused
discards-uncounted~datapath/egress.rs~let mut count = |refusal| books.count(&mut port.state, refusal, OutputDropReason::OutputDown);~let mut count = |refusal: Refusal| drop((books, refusal));~ns:refusals~a_removed_interface_costs_named_drops_only::xsk_fused
no-rung-below~supervisor/ports.rs~let insisted = matches!(~let insisted = self.options.frames > 0 || matches!(~ns:fallback~a_bridge_falls_back_to_af_packet
plain-unsaid~supervisor/report.rs~plain.is_some() { "af_packet_plain" }~plain.is_some() { "af_packet" }~ns:fallback~plain_sockets_say_that_they_are_it
multicast-source-accepted~datapath/rewrite.rs~if source_is_multicast(headers) {~if source_is_multicast(headers) && headers.family == 0 {~ns:hostile~a_hostile_corpus_has_the_same_fate_on_every_path
no-memory-ends-it~supervisor/fleet.rs~Segment::create(name, len).map(Segment::into_parts).map_err(RunError::failure);~Segment::create(name, len).map(Segment::into_parts).map_err(|error| if len > 0 { std::process::abort() } else { RunError::failure(error) });~ns:surroundings~a_start_without_memory_is_said
refused-config-unnamed~supervisor/engine.rs~tracing::error!(%error, "configuration refused, nothing changed");~tracing::error!("configuration refused, nothing changed");~ns:reload~sighup_reads_the_file_again_or_changes_nothing
link-local-accepted~rule/check.rs~return if local {~return if local && group.len == 0 {~ns:bad_input~a_run_with_bad_arguments_changes_nothing
frame-border-crossed~frame/umem.rs~if desc.len > FRAME_SIZE - offset {~if desc.len > FRAME_SIZE {~lib:fuzz~descriptors_of_a_ring_are_claimed_or_refused
bad-header-sum-accepted~datapath/rewrite.rs~if !verifies(header) {~if !verifies(header) && header.is_empty() {~lib:fuzz~packets_are_parsed_and_rewritten
refused-sends-uncounted~datapath/egress.rs~books.count(state, refusal, OutputDropReason::SendFailed);~books.count(state, refusal, OutputDropReason::MtuExceeded);~ns:refusals~what_the_far_end_cannot_take_is_send_failed::packet
LIST
)

selected() { [ $# -eq 1 ] || { local name=$1; shift; for want in "$@"; do [ "$want" = "$name" ] && return 0; done; return 1; }; }

if [ "${1:-}" = "--list" ]; then cut -d'~' -f1,5,6 --output-delimiter='	' <<<"$mutants"; exit 0; fi
together=
if [ "${1:-}" = "--together" ]; then together=1; shift; fi
for want in "$@"; do
  grep -q "^$want~" <<<"$mutants" || { echo "mutants: no mutant named $want: see --list" >&2; exit 2; }
done
[ -z "$together" ] || [ $# -gt 0 ] || { echo "mutants: --together needs names" >&2; exit 2; }

copy=$(mktemp -d)
# The model checker's crate takes its files from outside its own folder, and cargo knows those by absolute path: a target directory that
# another checkout has filled would look fresh, and every mutant would survive.
loom_target=$copy/target/loom
trap 'rm -rf "$copy"' EXIT
git ls-files -co --exclude-standard -z | tar --null -T - -cf - | tar -xf - -C "$copy"
# Mutated programs are built apart, so that none is ever found where the relay is looked for; what they depend on is there already.
ns_target=$unit_target/mutants
if grep -q '~ns:' <<<"$mutants" && [ ! -d "$ns_target" ] && [ -d "$unit_target/debug/deps" ]; then
  mkdir -p "$ns_target/debug"
  cp -al "$unit_target"/debug/{.fingerprint,build,deps} "$ns_target/debug/"
fi

build_program() { (cd "$copy" && CARGO_TARGET_DIR=$ns_target cargo build -q -p relay); }

run() { # runner, test
  case $1 in
    loom) (cd "$copy" && CARGO_TARGET_DIR=$loom_target RUSTFLAGS="--cfg loom" timeout 300 cargo test -q -p relay-loom --release -- "$2") ;;
    unit) (cd "$copy" && CARGO_TARGET_DIR=$unit_target RELAY_CRASH_ROUNDS=5 timeout 300 cargo test -q -p relay --lib -- "$2") ;;
    lib:*) (cd "$copy" && CARGO_TARGET_DIR=$ns_target timeout 600 cargo test -q -p relay-tests --test "${1#lib:}" -- "$2") ;;
    ns:*) [ -n "$together" ] || build_program || return
      cargo test -q -p relay-tests --test "${1#ns:}" --no-run || return
      RELAY_BIN=$ns_target/debug/relay timeout 120 cargo test -q -p relay-tests --test "${1#ns:}" -- --test-threads=1 --nocapture "$2" \
        || { [ $? -ne 124 ] || echo "timed out"; false; } ;;
  esac
}

inject() { # file, old, new
  OLD=$(printf '%b' "$2") NEW=$(printf '%b' "$3") perl -0pi -e 'BEGIN { $count = 0 } $count += s/\Q$ENV{OLD}\E/$ENV{NEW}/; END { exit($count == 1 ? 0 : 1) }' "$copy/relay/src/$1"
}

judge() { # name, runner, test
  local output
  if output=$(run "$2" "$3" 2>&1); then
    echo "SURVIVED  $1 ($3 passed, or no test of that name ran)"; survived=$((survived + 1))
  elif grep -q "could not compile" <<<"$output" || ! grep -q "test result: FAILED\|panicked at\|SIG\|timed out" <<<"$output"; then
    echo "BROKEN    $1: did not compile"; tail -5 <<<"$output"; survived=$((survived + 1))
  else
    echo "killed    $1 by $3"; killed=$((killed + 1))
    [[ $2 != ns:* ]] || { grep -m1 -A1 "panicked at tests" <<<"$output" || true; } | cut -c1-200 | sed 's/^/          /'
  fi
}

# A mutant that does not compile proves nothing, and one whose test passes on the original neither: both are checked.
survived=0 killed=0 chosen=()
while IFS='~' read -r name file old new runner test; do
  selected "$name" "$@" || continue
  if ! inject "$file" "$old" "$new"; then
    echo "STALE     $name: the text to mutate is no longer in $file"; survived=$((survived + 1))
  elif [ -n "$together" ]; then
    chosen+=("$name~$runner~$test"); continue
  else
    judge "$name" "$runner" "$test" </dev/null
  fi
  [ -n "$together" ] || cp "$root/relay/src/$file" "$copy/relay/src/$file"
done <<<"$mutants"
if [ -n "$together" ]; then
  build_program
  for one in "${chosen[@]}"; do
    IFS='~' read -r name runner test <<<"$one"
    judge "$name" "$runner" "$test" </dev/null
  done
fi
echo "$killed killed, $survived not"
[ "$survived" -eq 0 ]
