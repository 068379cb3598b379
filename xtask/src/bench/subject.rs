//! The images that are measured: those of our recipes, and any other, described in a TOML file:
//!
//! ```toml
//! name = "web"                                       # in tables and registries
//! image = "docker://registry.example/shop/web:1.4"   # as skopeo takes it
//! ready = "http:http://127.0.0.1:8080/"              # as `tdfs record --ready` takes it
//! port = 8080                                        # which the client asks: for "/" if `ready` is http, which must be 200
//! ```
//!
//! It runs with the command of its configuration. Its layers are compressed anew where they are not as a method wants them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;
use xtask::command;
use xtask::images::{self, Cache, Compression, Image, Service};

/// An image, ready to be pushed and run.
pub struct Subject {
    /// In tables and registries.
    pub name: String,
    /// How it is run.
    pub service: Service,
    source: Source,
    /// Unpacked layers, the uppermost first.
    pub lower: Vec<PathBuf>,
    /// Command, environment, directory and user as runc has them; unless they are the usual ones and the service's command.
    pub process: Option<Value>,
}

enum Source {
    Recipe(&'static Image),
    /// What skopeo copies, and where to.
    Described {
        image: String,
        directory: PathBuf,
    },
}

impl Source {
    fn layout(&self, compression: Compression) -> Result<PathBuf> {
        let (image, directory) = match self {
            Self::Recipe(image) => return Cache::default().image(image, compression),
            Self::Described { image, directory } => (image, directory),
        };
        let format = if compression == Compression::Gzip { "gzip" } else { "zstd" };
        let layout = directory.join(format);
        if layout.is_dir() {
            return Ok(layout);
        }
        let to = format!("oci:{}:latest", layout.display());
        let compressed = ["copy", "--dest-compress-format", format];
        command::output(Command::new("skopeo").args(compressed).args([image, &to]))?;
        Ok(layout)
    }
}

/// The file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    name: String,
    image: String,
    ready: String,
    port: u16,
}

impl Subject {
    /// The image of the recipe called `named`, or the one described in the file at `named`; what it needs besides our
    /// cache lies in `directory`.
    pub fn new(named: &str, directory: &Path) -> Result<Self> {
        if Path::new(named).extension().is_some_and(|extension| extension == "toml") {
            return Self::described(&Description::read(named)?, directory);
        }
        let image = images::recipe(named)?;
        Ok(Self {
            name: image.name.to_owned(),
            service: image.services[0],
            source: Source::Recipe(image),
            lower: Cache::default().unpacked(image)?,
            process: None,
        })
    }

    /// The layout with its image, tag `latest`, made the first time.
    pub fn layout(&self, compression: Compression) -> Result<PathBuf> {
        self.source.layout(compression)
    }

    fn described(description: &Description, directory: &Path) -> Result<Self> {
        let source = Source::Described { image: description.image.clone(), directory: directory.to_owned() };
        let bundle = directory.join("unpacked");
        let image = format!("{}:latest", source.layout(Compression::Gzip)?.display());
        command::output(Command::new("umoci").args(["unpack", "--image", &image]).arg(&bundle))?;
        let spec: Value = serde_json::from_slice(&fs::read(bundle.join("config.json"))?)?;
        // Services are constants; this one lasts as long as the benchmark.
        let constant = |text: &str| &*text.to_owned().leak();
        let (name, ready) = (constant(&description.name), constant(&description.ready));
        let service = Service { name, command: &[], ready, port: description.port };
        let (name, process) = (description.name.clone(), Some(spec["process"].clone()));
        Ok(Self { name, service, source, lower: vec![bundle.join("rootfs")], process })
    }
}

impl Description {
    fn read(path: &str) -> Result<Self> {
        let read: Self = toml::from_str(&fs::read_to_string(path).with_context(|| path.to_owned())?)
            .with_context(|| path.to_owned())?;
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let good = read.name.chars().all(plain) && read.name.starts_with(|c: char| c.is_ascii_alphanumeric());
        ensure!(good && !read.name.ends_with('-'), "{path}: name is to be of a-z, 0-9 and - in between");
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_are_checked() {
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        let read = |text: &str| {
            fs::write(&file, text).unwrap();
            Description::read(&file.path().display().to_string())
        };
        let rest = "image = 'oci:x'\nready = 'tcp:80'\nport = 80\n";
        assert_eq!(read(&format!("name = 'web-1'\n{rest}")).unwrap().port, 80);
        for bad in ["", "-web", "Web", "a/b", "web-"] {
            assert!(read(&format!("name = '{bad}'\n{rest}")).is_err(), "{bad}");
        }
        assert!(read(&format!("name = 'web'\nprot = 1\n{rest}")).is_err());
    }
}
