//! Containers under the real runc.
#![allow(clippy::unwrap_used, reason = "helpers of tests, which may fail by panicking")]

use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::sys::signal::Signal;
use oci_spec::image::ImageConfiguration;
use tdfs_agent::record::sandbox::{
    Accounts, Exit, Forward, Launch, Network, Sandbox, SandboxError, SandboxSpec, Workload, remove_leftover,
};

/// A root file system with the host's own shell in it, good enough to run commands.
fn rootfs(dir: &Path) {
    for name in ["proc", "dev", "sys", "etc", "tmp", "bin", "usr", "lib", "lib64"] {
        std::fs::create_dir(dir.join(name)).unwrap();
    }
    let output = std::process::Command::new("ldd").args(["/bin/sh", "/bin/sleep"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let libraries = text.split_whitespace().filter(|w| w.starts_with("/lib") && !w.ends_with(':'));
    for file in libraries.chain(["/bin/sh", "/bin/sleep"]) {
        let to = dir.join(&file[1..]);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(file, to).unwrap();
    }
}

fn configuration() -> ImageConfiguration {
    let rest = r#""architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"history":[]"#;
    serde_json::from_str(&format!(r#"{{{rest},"config":{{"Entrypoint":["/bin/sh","-c"]}}}}"#)).unwrap()
}

struct Fixture {
    dir: tempfile::TempDir,
    configuration: ImageConfiguration,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        rootfs(&dir.path().join("rootfs"));
        Self { dir, configuration: configuration() }
    }

    fn id(&self) -> String {
        format!(
            "tdfs-test-{}",
            self.dir.path().file_name().unwrap().to_str().unwrap().trim_start_matches('.')
        )
    }

    async fn create(&self, script: &str, lines: &Arc<Mutex<Vec<String>>>) -> Result<Sandbox, SandboxError> {
        let lines = Arc::clone(lines);
        let args = [script.to_owned()];
        let spec = SandboxSpec {
            rootfs: &self.dir.path().join("rootfs"),
            workload: Workload {
                configuration: &self.configuration,
                args: Some(&args),
                accounts: Accounts::default(),
                network: Network::Private,
            },
            forward: Forward::Stderr,
            on_line: Some(Arc::new(move |l| {
                lines.lock().unwrap().push(String::from_utf8_lossy(l).into_owned());
            })),
        };
        self.launch()?.finish(spec).await
    }

    fn launch(&self) -> Result<Launch, SandboxError> {
        Launch::create(&self.id(), &self.dir.path().join("bundle"), &self.dir.path().join("runc"))
    }
}

#[tokio::test]
async fn a_container_runs_and_tells_how_it_ended() {
    let fixture = Fixture::new();
    let lines = Arc::default();
    let sandbox = fixture.create("echo one; echo two >&2; read x; exit 7", &lines).await.unwrap();
    assert!(lines.lock().unwrap().is_empty(), "nothing runs before start");
    sandbox.start().await.unwrap();
    assert_eq!(sandbox.wait().await, Exit::Code(7));
    assert_eq!(sandbox.delete().await.unwrap(), Exit::Code(7));
    let mut lines = lines.lock().unwrap().clone();
    lines.sort();
    assert_eq!(lines, ["one", "two"]);
}

#[tokio::test]
async fn a_paused_container_stands_still_until_it_is_removed() {
    let fixture = Fixture::new();
    let sandbox = fixture.create("exec sleep 1000", &Arc::default()).await.unwrap();
    sandbox.start().await.unwrap();
    sandbox.pause().await.unwrap();
    assert_eq!(sandbox.exit(), None);
    assert_eq!(sandbox.delete().await.unwrap(), Exit::Signal(Signal::SIGKILL as i32));
}

#[tokio::test]
async fn signals_reach_the_process() {
    let fixture = Fixture::new();
    let sandbox =
        fixture.create("trap 'exit 3' TERM; while :; do sleep 0.05; done", &Arc::default()).await.unwrap();
    sandbox.start().await.unwrap();
    // The first process of a PID namespace ignores signals that it has no handler for (yet).
    while sandbox.exit().is_none() {
        sandbox.signal(Signal::SIGTERM).unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert_eq!(sandbox.delete().await.unwrap(), Exit::Code(3));
}

#[tokio::test]
async fn a_leftover_is_removed() {
    let fixture = Fixture::new();
    let sandbox = fixture.create("exec sleep 1000", &Arc::default()).await.unwrap();
    sandbox.start().await.unwrap();
    let runc_root = fixture.dir.path().join("runc");
    remove_leftover(&runc_root, &fixture.id()).await.unwrap();
    assert_eq!(sandbox.wait().await, Exit::Signal(Signal::SIGKILL as i32));
    remove_leftover(&runc_root, &fixture.id()).await.unwrap();
}

#[tokio::test]
async fn runc_errors_are_one_clear_line() {
    let fixture = Fixture::new();
    std::fs::remove_file(fixture.dir.path().join("rootfs/bin/sh")).unwrap();
    let Err(error) = fixture.create("true", &Arc::default()).await else {
        panic!("created without a program")
    };
    let text = error.to_string();
    assert!(text.contains("runc create") && text.contains("/bin/sh") && !text.contains('\n'), "{text}");
}
