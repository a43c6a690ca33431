//! What the book says works: its commands run as they stand, in order, and its rules are taken by a relay.
//!
//! Each page has a laboratory of its own, whose interfaces are called `eth0`, `eth1`, `eth2` on the relay's host and `eth0` on the
//! sender and the receiver. A block of `sh` is one script; a line that ends in `# exit code N` has to end so.
#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world has failed")]

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use relay::lab::Namespace;
use relay::rule::Rule;
use relay_tests::{Lab, LabSpec, needs_root, paths, relay_bin};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A fenced block: the words after the fence, its text.
struct Block {
    kind: String,
    text: String,
}

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs")
}

fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<PathBuf> = std::fs::read_dir(docs()).unwrap().map(|entry| entry.unwrap().path()).collect();
    pages.retain(|page| page.extension().is_some_and(|extension| extension == "md"));
    pages.sort();
    pages
}

fn blocks(page: &Path) -> Vec<Block> {
    let text = std::fs::read_to_string(page).unwrap();
    let mut blocks: Vec<Block> = Vec::new();
    let mut open = false;
    for line in text.lines() {
        match (line.strip_prefix("```"), open) {
            (Some(_), true) => open = false,
            (Some(kind), false) => {
                open = true;
                blocks.push(Block { kind: kind.trim().into(), text: String::new() });
            }
            (None, true) => blocks.iter_mut().last().unwrap().text += &format!("{line}\n"),
            (None, false) => {}
        }
    }
    assert!(!open, "{}: a block is not closed", page.display());
    blocks
}

/// Processes of a page, killed with everything they have started.
struct Running(Vec<(String, Child)>);

impl Drop for Running {
    fn drop(&mut self) {
        for (_, child) in &mut self.0 {
            let group = Pid::from_raw(child.id() as i32);
            // A group that has ended already is what was wanted.
            let _ = killpg(group, Signal::SIGTERM);
            let _ = child.wait();
            let begin = Instant::now();
            while killpg(group, None).is_ok() && begin.elapsed() < Duration::from_secs(3) {
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = killpg(group, Signal::SIGKILL);
        }
    }
}

/// The laboratory of a page.
struct World {
    lab: Lab,
    directory: tempfile::TempDir,
    running: Running,
}

impl World {
    fn new() -> Self {
        let lab = Lab::new(LabSpec { sinks: 2, separate_sinks: true, ..LabSpec::default() }).unwrap();
        let rename = |namespace: &Namespace, from: &str, to: &str| {
            namespace.ip_batch(&format!("link set {from} down\nlink set {from} name {to}\nlink set {to} up\n")).unwrap();
        };
        for link in 0..3 {
            rename(&lab.relay, &format!("r{link}"), &format!("eth{link}"));
        }
        rename(&lab.src, "s0", "eth0");
        rename(lab.sink(1), "k1", "eth0");
        for namespace in [&lab.src, lab.sink(1)] {
            namespace.ip_batch("route replace 224.0.0.0/4 dev eth0\n").unwrap();
        }
        Self { lab, directory: tempfile::tempdir().unwrap(), running: Running(Vec::new()) }
    }

    /// A shell for a script, in a process group of its own.
    fn shell(&self, namespace: &Namespace, script: &str) -> Child {
        let bin = relay_bin().unwrap();
        let path = format!("{}:{}", bin.parent().unwrap().display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("sh");
        command.args(["-eu", "-c", script]).current_dir(self.directory.path()).stdin(Stdio::null()).process_group(0);
        command.env("PATH", path).env("RELAY_SOCKET", self.directory.path().join("relay.sock"));
        namespace.run(|| command.spawn().unwrap()).unwrap()
    }

    fn run(&mut self, block: &Block) {
        let script = script(&block.text);
        match block.kind.as_str() {
            "sh on the receiver" => {
                let child = self.shell(self.lab.sink(1), &script);
                self.running.0.push((script, child));
                std::thread::sleep(Duration::from_millis(300));
            }
            "sh on the sender" => self.finish(self.shell(&self.lab.src, &script), &script),
            _ if script.contains("relay run ") => {
                // Its processes live as long as the page.
                let child = self.shell(&self.lab.relay, &format!("{script}\nwait"));
                self.running.0.push((String::new(), child));
                let mut ready =
                    self.shell(&self.lab.relay, "for i in $(seq 100); do grep -q forwards relay.log && exit; sleep 0.05; done; exit 1");
                assert!(ready.wait().unwrap().success(), "not ready: {script}\n{}", self.read("relay.log"));
            }
            _ => self.finish(self.shell(&self.lab.relay, &script), &script),
        }
    }

    fn finish(&self, mut child: Child, script: &str) {
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}: {script}\n{}", self.read("relay.log"));
    }

    /// What runs on a receiver has to end by itself, and well.
    fn end(mut self) {
        for (script, child) in self.running.0.iter_mut().filter(|(script, _)| !script.is_empty()) {
            let status = child.wait().unwrap();
            assert!(status.success(), "{status}: {script}");
        }
    }

    fn read(&self, file: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(file)).unwrap_or_default()
    }
}

/// With the exit codes that the page announces.
fn script(text: &str) -> String {
    let line = |line: &str| match line.split_once("# exit code ") {
        Some((command, code)) => format!("{command} && exit 77 || test $? = {}", code.trim()),
        None => line.to_owned(),
    };
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}

fn is_run(block: &Block) -> bool {
    matches!(block.kind.as_str(), "sh" | "sh on the sender" | "sh on the receiver")
}

#[test]
fn every_command_of_the_book_runs() {
    needs_root!();
    let _turn = paths::turn();
    for page in pages() {
        let name = page.file_name().unwrap().to_string_lossy().into_owned();
        let blocks = blocks(&page);
        for block in blocks.iter().filter(|block| block.kind.starts_with("sh") && !is_run(block)) {
            eprintln!("{name}: not run, {}", block.kind);
        }
        if !blocks.iter().any(is_run) {
            continue;
        }
        let mut world = World::new();
        blocks.iter().filter(|block| is_run(block)).for_each(|block| world.run(block));
        world.end();
        eprintln!("{name}: {} blocks ran", blocks.iter().filter(|block| is_run(block)).count());
    }
}

/// Each by itself: read, in force at once, gone again.
#[test]
fn every_rule_of_the_book_is_taken() {
    needs_root!();
    let _turn = paths::turn();
    let rules: Vec<String> = pages().iter().flat_map(|page| blocks(page)).filter(|block| block.kind == "rule").flat_map(lines).collect();
    assert!(rules.len() >= 12, "{rules:?}");
    let mut world = World::new();
    world.run(&Block { kind: "sh".into(), text: "relay run > relay.log 2>&1 &".into() });
    for rule in rules {
        let id = rule.parse::<Rule>().unwrap_or_else(|error| panic!("{rule}: {error}")).id;
        world.run(&Block { kind: "sh".into(), text: format!("relay rule add '{rule}'\nrelay rule del {id}") });
    }
}

fn lines(block: Block) -> Vec<String> {
    block.text.lines().map(str::to_owned).collect()
}

#[test]
fn links_between_pages_lead_somewhere() {
    for page in pages() {
        let text = std::fs::read_to_string(&page).unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target) {
            let file = docs().join(target.split('#').next().unwrap());
            assert!(target.starts_with("http") || file.exists(), "{}: {target}", page.display());
        }
    }
}
