//! Another way to start a container, described in a TOML file:
//!
//! ```toml
//! name = "lazy loader"
//! prepare = "convert $IMAGE ..."   # once, not timed; may be left out
//! reset = "rm -rf $STATE/..."      # before each start, not timed; may be left out
//! start = "loader run $IMAGE ..."  # timed until the service answers in the node's network
//! clean = "loader rm ..."          # after each start; may be left out
//! ```
//!
//! Each is a shell command that runs in the network of the node and gets `IMAGE` (reference of the gzip image in a plain
//! registry), `IMAGE_ZSTD`, `STATE` (a directory, empty before each start), `SERVICE` (the command to run in the
//! container; empty where it is the image's own) and `PORT`. `start` may end or go on; what it left running, `clean` ends.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use tempfile::TempDir;
use xtask::command;
use xtask::images::Service;
use xtask::network::Place;
use xtask::ready;

use super::methods::{Method, Moment, Start};

/// The file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    name: String,
    prepare: Option<String>,
    reset: Option<String>,
    start: String,
    clean: Option<String>,
}

impl Description {
    /// Reads a description.
    pub fn read(path: &Path) -> Result<Self> {
        let at = || path.display().to_string();
        toml::from_str(&fs::read_to_string(path).with_context(at)?).with_context(at)
    }
}

/// A described method, for one image.
pub struct Peer<'a> {
    description: Description,
    place: Place,
    directory: &'a Path,
    image: String,
    image_zstd: String,
    service: &'a Service,
    state: Option<TempDir>,
}

impl<'a> Peer<'a> {
    /// Runs `prepare`.
    pub fn new(
        description: Description,
        place: &Place,
        directory: &'a Path,
        (image, image_zstd): (String, String),
        service: &'a Service,
    ) -> Result<Self> {
        let place = place.clone();
        let mut peer = Self { description, place, directory, image, image_zstd, service, state: None };
        peer.state = Some(TempDir::with_prefix_in("peer-", directory)?);
        if let Some(prepare) = &peer.description.prepare {
            command::output(&mut peer.shell(prepare)?)?;
        }
        Ok(peer)
    }

    fn shell(&self, script: &str) -> Result<Command> {
        let state = self.state.as_ref().context("no state directory")?;
        let mut command = self.place.command("sh");
        command.args(["-euc", script]).env("IMAGE", &self.image).env("IMAGE_ZSTD", &self.image_zstd);
        command.env("STATE", state.path()).env("SERVICE", self.service.command.join(" "));
        command.env("PORT", self.service.port.to_string());
        Ok(command)
    }
}

impl Method for Peer<'_> {
    fn name(&self) -> &str {
        &self.description.name
    }

    fn reset(&mut self) -> Result<()> {
        self.state = Some(TempDir::with_prefix_in("peer-", self.directory)?);
        if let Some(reset) = &self.description.reset {
            command::output(&mut self.shell(reset)?)?;
        }
        Ok(())
    }

    fn start(&mut self, reached: &mut dyn FnMut(Moment)) -> Result<Start> {
        let Some(namespace) = self.place.namespace() else {
            bail!("a peer is measured at the end of a link")
        };
        let mut start = self.shell(&self.description.start)?;
        start.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let started = Instant::now();
        let mut child = start.spawn().context("cannot start a shell")?;
        let outcome = ready::wait_in(self.service, namespace, None);
        let ready_ms = started.elapsed().as_secs_f64() * 1000.0;
        reached(Moment::Answered);
        if let Some(clean) = &self.description.clean {
            command::output(&mut self.shell(clean)?)?;
        }
        let _ = child.kill();
        child.wait()?;
        outcome?;
        Ok(Start { ready_ms, ..Start::default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_key_is_an_error() {
        let read = |text: &str| toml::from_str::<Description>(text);
        assert!(read("name = 'x'\nstart = 'true'\n").is_ok());
        assert!(read("name = 'x'\nstart = 'true'\ncleen = 'true'\n").is_err());
        assert!(read("name = 'x'\n").is_err());
    }
}
