//! The node daemon: mounts that share one file system, and what becomes of them when it ends.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tdfs_tests::fingerprint::Fingerprint;
use tdfs_tests::images::Unpacked;

use super::*;

/// In no runtime image of nginx.
const COLD: &str = "usr/bin/perl";
/// In every one.
const HOT: &str = "usr/sbin/nginx";

struct Agent {
    child: Child,
}

impl Agent {
    /// Starts one for the state directory `node` and waits, as systemd does, until it says that it is ready.
    fn start(recorded: &Recorded, node: &Path) -> Result<Self> {
        let config = recorded.path("config.toml");
        fs::write(&config, format!("state = {:?}\n", show(node)))?;
        let notify = recorded.path("notify");
        let _ = fs::remove_file(&notify);
        let socket = UnixDatagram::bind(&notify)?;
        socket.set_read_timeout(Some(Duration::from_secs(30)))?;
        let program = tdfs::program()?.with_file_name("tdfs-agent");
        let mut command = Command::new(program);
        command.arg("--config").arg(&config).env("NOTIFY_SOCKET", &notify).stdout(Stdio::null());
        let agent = Self { child: command.spawn().context("start tdfs-agent")? };
        let mut message = [0; 64];
        let len = socket.recv(&mut message).context("it is not ready")?;
        ensure!(message[..len].starts_with(b"READY=1"), "{message:?}");
        Ok(agent)
    }

    fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal)?;
        Ok(self.child.wait()?)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.end(Signal::SIGTERM);
        }
    }
}

fn mount(image: &str, node: &Path, target: &Path) -> Result<Value> {
    fs::create_dir_all(target)?;
    tdfs::json(["mount", image, &show(target), "--state", &show(node)])
}

fn umount(node: &Path, target: &Path) -> Result<()> {
    tdfs::json(["umount", &show(target), "--state", &show(node)]).map(drop)
}

#[test]
fn mounts_of_one_image_share_a_file_system() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    let (node, image) = (recorded.path("node"), recorded.reference());
    let mut agent = Agent::start(&recorded, &node)?;
    let [one, two, other] = ["one", "two two", "other"].map(|name| recorded.path(name));
    let first = mount(&image, &node, &one)?;
    ensure!(first["pid"] == agent.child.id() && number(&first, "pages_fetched")? > 0, "{first}");
    let second = mount(&image, &node, &two)?;
    ensure!(number(&second, "pages_fetched")? == 0 && second["service"] == first["service"], "{second}");
    ensure!(fs::metadata(&one)?.dev() == fs::metadata(&two)?.dev(), "two file systems for one image");
    fs::create_dir(&other)?;
    let bare = ["mount", &image, &show(&other), "--state", &show(&node), "--no-runtime-image"];
    ensure!(tdfs::json(bare)?["service"].is_null());
    ensure!(fs::metadata(&one)?.dev() != fs::metadata(&other)?.dev(), "without its runtime image");
    umount(&node, &other)?;

    umount(&node, &one)?;
    let oracle = Fingerprint::of(&Unpacked::new(&images::image("nginx")?, "latest")?.path())?;
    Fingerprint::of(&two)?.expect_equal(&oracle)?;
    // The last one takes the file system with it; the next makes it again, from what is here.
    umount(&node, &two)?;
    expect_clean(&node)?;
    let again = mount(&image, &node, &one)?;
    ensure!(number(&again, "pages_fetched")? == 0, "{again}");

    ensure!(agent.end(Signal::SIGTERM)?.success());
    expect_clean(&node)?;
    ensure!(!one.join(HOT).exists() && !node.join("agent/socket").exists(), "it left something");
    // Without it a mount has a server of its own.
    let own = mount(&image, &node, &one)?;
    ensure!(own["pid"] != agent.child.id(), "{own}");
    umount(&node, &one)
}

#[test]
fn many_at_once_mount_once() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    let node = recorded.path("node");
    let _agent = Agent::start(&recorded, &node)?;
    let targets: Vec<PathBuf> = (0..8).map(|n| recorded.path(&format!("target{n}"))).collect();
    let image = recorded.reference();
    let reports = std::thread::scope(|scope| {
        let mounting = targets.iter().map(|target| scope.spawn(|| mount(&image, &node, target)));
        let mounting: Vec<_> = mounting.collect();
        let joined = mounting.into_iter().map(|m| m.join().unwrap_or_else(|_| anyhow::bail!("panicked")));
        joined.collect::<Result<Vec<_>>>()
    })?;
    let fetched = reports.iter().map(|r| number(r, "pages_fetched")).collect::<Result<Vec<_>>>()?;
    ensure!(fetched.iter().filter(|pages| **pages > 0).count() == 1, "{fetched:?}");
    let devices = targets.iter().map(|t| Ok(fs::metadata(t)?.dev())).collect::<Result<Vec<_>>>()?;
    ensure!(devices.iter().all(|device| *device == devices[0]), "{devices:?}");
    targets.iter().try_for_each(|target| umount(&node, target))?;
    expect_clean(&node)
}

#[test]
fn bad_requests_are_refused_and_nothing_else_suffers() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    let node = recorded.path("node");
    let agent = Agent::start(&recorded, &node)?;
    let socket = node.join("agent/socket");
    ensure!(fs::metadata(node.join("agent"))?.permissions().mode() & 0o777 == 0o700, "others may connect");
    let say = |text: &[u8]| -> Result<String> {
        let mut stream = UnixStream::connect(&socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        // It may answer before it has everything.
        let _ = stream.write_all(text);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        Ok(answer)
    };
    let relative = r#"{"mount":{"image":"oci:x","target":"/mnt","choice":"any","pull":"missing","registries":
        {"plain_http":null,"mirrors":[],"auth_file":null,"ca_file":null,"page_service":true,
        "platform":{"os":"linux","architecture":"amd64"}}}}"#;
    let relative = format!("{}\n", relative.replace('\n', ""));
    let endless = b"[".repeat(100_000);
    for (request, why) in [
        (&b"\n"[..], "not understood"),
        (b"GET / HTTP/1.1\r\n\r\n", "not understood"),
        (b"{\"mount\":{}}\n", "missing field"),
        (b"{\"mount\"", "cut off"),
        (relative.as_bytes(), "no absolute path"),
        (&endless, "longer than"),
    ] {
        let answer: Value = serde_json::from_str(&say(request)?)?;
        let reason = answer["failed"].as_str().context("it did not fail")?;
        ensure!(reason.contains(why) && !reason.contains('\n'), "{reason}");
    }
    let target = recorded.path("target");
    fs::create_dir(&target)?;
    let absent = format!("{}:absent", recorded.reference());
    let error = tdfs::error(["mount", &absent, &show(&target), "--state", &show(&node)])?;
    ensure!(error.contains("absent"), "{error}");
    let nowhere = recorded.path("nowhere");
    let error = tdfs::error(["mount", &recorded.reference(), &show(&nowhere), "--state", &show(&node)])?;
    ensure!(error.contains("nowhere"), "{error}");

    let config = recorded.path("config.toml");
    let second =
        Command::new(tdfs::program()?.with_file_name("tdfs-agent")).arg("--config").arg(config).output()?;
    let error = String::from_utf8_lossy(&second.stderr).into_owned();
    ensure!(!second.status.success() && error.contains("another tdfs-agent"), "{error}");

    let report = mount(&recorded.reference(), &node, &target)?;
    ensure!(report["pid"] == agent.child.id(), "{report}");
    umount(&node, &target)?;
    expect_clean(&node)
}

#[test]
fn a_killed_agent_fails_closed_and_the_next_one_cleans_up() -> Result<()> {
    let recorded = Recorded::new("nginx", 1)?;
    let (node, target) = (recorded.path("node"), recorded.path("target"));
    let mut agent = Agent::start(&recorded, &node)?;
    mount(&recorded.reference(), &node, &target)?;
    let hot = fs::read(target.join(HOT)).is_ok();
    agent.end(Signal::SIGKILL)?;
    let cold = fs::read(target.join(COLD)).err().context("a cold file was read from nobody")?;
    ensure!(hot && cold.raw_os_error() == Some(libc::EIO), "{cold}");

    let _next = Agent::start(&recorded, &node)?;
    expect_clean(&node)?;
    ensure!(fs::read_dir(&target)?.next().is_none(), "still mounted");
    mount(&recorded.reference(), &node, &target)?;
    let unpacked = Unpacked::new(&images::image("nginx")?, "latest")?;
    ensure!(fs::read(target.join(COLD))? == fs::read(unpacked.path().join(COLD))?);
    umount(&node, &target)?;
    expect_clean(&node)
}
