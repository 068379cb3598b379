//! The daemon's configuration, all of it.
//!
//! ```toml
//! state = "/var/lib/tdfs"   # cache and state directory, as --state of the commands
//! log = "info"              # what to log: a level, or directives as in RUST_LOG, which overrides it
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::AgentError;

/// Bytes of the largest file.
const SIZE_MAX: u64 = 1 << 20;

/// What the daemon is told by its file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Cache and state directory.
    pub state: PathBuf,
    /// Filter of what is logged.
    pub log: String,
}

impl Default for Config {
    fn default() -> Self {
        Self { state: "/var/lib/tdfs".into(), log: "info".into() }
    }
}

impl Config {
    /// Where it is looked for unless told otherwise.
    pub const PATH: &str = "/etc/tdfs/config.toml";

    /// Reads the file at `path`. Without one there, the defaults hold, unless it `must_exist`.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, is not TOML, or holds what is not known.
    pub fn read(path: &Path, must_exist: bool) -> Result<Self, AgentError> {
        let failed = |reason: String| AgentError::Config { path: path.to_owned(), reason };
        match fs::metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound && !must_exist => return Ok(Self::default()),
            Ok(meta) if meta.len() > SIZE_MAX => return Err(failed("too large".into())),
            _ => {}
        }
        let text = fs::read_to_string(path).map_err(|e| failed(e.to_string()))?;
        let config: Self = toml::from_str(&text).map_err(|e| failed(e.message().replace('\n', " ")))?;
        if !config.state.is_absolute() {
            return Err(failed(format!("state {} is not an absolute path", config.state.display())));
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        fs::write(&path, text).unwrap();
        Config::read(&path, true).map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_left_out_has_a_default() {
        assert_eq!(read("").unwrap(), Config::default());
        let config = read("state = \"/srv/tdfs\"\n").unwrap();
        assert_eq!((config.state.as_path(), config.log.as_str()), (Path::new("/srv/tdfs"), "info"));
    }

    #[test]
    fn what_is_wrong_is_said_on_one_line() {
        for (text, why) in [
            ("stat = \"/x\"", "unknown field `stat`"),
            ("state = 3", "invalid type"),
            ("state = ", ""),
            ("state = \"relative\"", "not an absolute path"),
        ] {
            let error = read(text).unwrap_err();
            assert!(
                error.contains(why) && error.contains("config.toml: ") && !error.contains('\n'),
                "{error}"
            );
        }
    }

    #[test]
    fn only_a_file_that_was_named_must_exist() {
        let absent = Path::new("/nonexistent/config.toml");
        assert_eq!(Config::read(absent, false).unwrap(), Config::default());
        assert!(Config::read(absent, true).is_err());
    }
}
