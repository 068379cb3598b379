//! Readiness probes as people write them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use regex::bytes::Regex;
use url::{Host, Url};

/// When a service counts as ready.
#[derive(Clone, Debug)]
pub enum Probe {
    /// `tcp:PORT`: something listens on the port.
    Tcp(u16),
    /// `http:URL[=STATUS]`: a GET is answered with the status, or any from 200 to 399.
    Http(HttpProbe),
    /// `log:REGEX`: a line of output matches.
    Log(Regex),
    /// `open:PATH`: the file of the image is opened. While recording: read or mapped for the first time.
    Open(String),
    /// `exec:PATH`: the file of the image is executed, as a program or as a script.
    Exec(String),
    /// `uprobe:PATH:SYMBOL`: the function of the program or library in the image is entered.
    Uprobe {
        /// The ELF file.
        path: String,
        /// A function in its symbol tables.
        symbol: String,
    },
    /// `exit[=CODE]`: the container ends with the code, 0 unless given.
    Exit(i32),
}

/// A request from inside the container's network.
#[derive(Clone, Debug)]
pub struct HttpProbe {
    url: Url,
    address: IpAddr,
    port: u16,
    status: Option<u16>,
}

impl HttpProbe {
    /// Where to connect to.
    pub fn address(&self) -> (IpAddr, u16) {
        (self.address, self.port)
    }

    /// `Host` of the request.
    pub fn host(&self) -> String {
        let host = self.url.host_str().unwrap_or_default();
        self.url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
    }

    /// Path and query of the request.
    pub fn target(&self) -> String {
        let query = self.url.query().map(|q| format!("?{q}")).unwrap_or_default();
        format!("{}{query}", self.url.path())
    }

    /// Whether an answer with this status means ready.
    pub fn accepts(&self, status: u16) -> bool {
        self.status.map_or((200..400).contains(&status), |wanted| wanted == status)
    }
}

/// A probe is not one.
#[derive(Debug, thiserror::Error)]
#[error("readiness probe {probe:?}: {reason}")]
pub struct ProbeError {
    probe: String,
    reason: String,
}

impl FromStr for Probe {
    type Err = ProbeError;

    fn from_str(text: &str) -> Result<Self, ProbeError> {
        parse(text).map_err(|reason| ProbeError { probe: text.to_owned(), reason })
    }
}

const KINDS: &str =
    "tcp:PORT, http:URL[=STATUS], log:REGEX, open:PATH, exec:PATH, uprobe:PATH:SYMBOL or exit[=CODE]";

fn parse(text: &str) -> Result<Probe, String> {
    let (kind, rest) = text.split_once([':', '=']).unwrap_or((text, ""));
    let separator = text.get(kind.len()..=kind.len()).unwrap_or_default();
    match (kind, separator) {
        ("tcp", ":") => port(rest).map(Probe::Tcp),
        ("http", ":") => http(rest).map(Probe::Http),
        ("log", ":") => {
            Regex::new(rest).map(Probe::Log).map_err(|e| format!("not a regular expression: {e}"))
        }
        ("open", ":") => path(rest).map(Probe::Open),
        ("exec", ":") => path(rest).map(Probe::Exec),
        ("uprobe", ":") => {
            let (file, symbol) = rest.rsplit_once(':').ok_or("want uprobe:PATH:SYMBOL")?;
            if symbol.is_empty() {
                return Err("want uprobe:PATH:SYMBOL".into());
            }
            Ok(Probe::Uprobe { path: path(file)?, symbol: symbol.to_owned() })
        }
        ("exit", "") => Ok(Probe::Exit(0)),
        ("exit", "=") => {
            let code: u8 = rest.parse().map_err(|_| "an exit code is a number from 0 to 255")?;
            Ok(Probe::Exit(code.into()))
        }
        _ => Err(format!("want {KINDS}")),
    }
}

fn port(text: &str) -> Result<u16, String> {
    match text.parse() {
        Ok(port @ 1..) => Ok(port),
        _ => Err("a port is a number from 1 to 65535".into()),
    }
}

fn path(text: &str) -> Result<String, String> {
    if text.starts_with('/') { Ok(text.to_owned()) } else { Err("want an absolute path in the image".into()) }
}

fn http(text: &str) -> Result<HttpProbe, String> {
    // `http://HOST/` is its own prefix.
    let text = if text.starts_with("//") { format!("http:{text}") } else { text.to_owned() };
    let status =
        |s: &str| (s.len() == 3).then(|| s.parse().ok().filter(|n| (100..600).contains(n))).flatten();
    let (address, status) = match text.rsplit_once('=') {
        Some((url, s)) if status(s).is_some() => (url, status(s)),
        _ => (text.as_str(), None),
    };
    let url = Url::parse(address).map_err(|e| format!("not a URL: {e}"))?;
    if url.scheme() != "http" {
        return Err("want an http:// URL".into());
    }
    let address = match url.host() {
        Some(Host::Ipv4(ip)) => ip.into(),
        Some(Host::Ipv6(ip)) => ip.into(),
        Some(Host::Domain("localhost")) => Ipv4Addr::LOCALHOST.into(),
        _ => {
            return Err(
                "the host must be an address or localhost: names mean nothing in the container".into()
            );
        }
    };
    let port = url.port_or_known_default().unwrap_or(80);
    Ok(HttpProbe { url, address, port, status })
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(port) => write!(f, "tcp:{port}"),
            Self::Http(http) => {
                write!(f, "http:{}", http.url)?;
                http.status.map_or(Ok(()), |status| write!(f, "={status}"))
            }
            Self::Log(regex) => write!(f, "log:{regex}"),
            Self::Open(path) => write!(f, "open:{path}"),
            Self::Exec(path) => write!(f, "exec:{path}"),
            Self::Uprobe { path, symbol } => write!(f, "uprobe:{path}:{symbol}"),
            Self::Exit(0) => write!(f, "exit"),
            Self::Exit(code) => write!(f, "exit={code}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_parses_again() {
        for text in [
            "tcp:80",
            "http:http://127.0.0.1:8080/a?b=c",
            "http:http://[::1]/x=204",
            "log:^ready (in|after) \\d+:",
            "open:/usr/lib/libc.so.6",
            "exec:/bin/sh",
            "uprobe:/usr/lib/a:b.so:main",
            "exit",
            "exit=3",
        ] {
            assert_eq!(text.parse::<Probe>().unwrap().to_string(), text);
        }
        assert_eq!(
            "http://localhost=200".parse::<Probe>().unwrap().to_string(),
            "http:http://localhost/=200"
        );
        assert_eq!("exit=0".parse::<Probe>().unwrap().to_string(), "exit");
    }

    #[test]
    fn a_wrong_probe_says_why() {
        for (text, why) in [
            ("", "want tcp:PORT"),
            ("tcp", "want tcp:PORT"),
            ("tcp=80", "want tcp:PORT"),
            ("tcp:0", "65535"),
            ("tcp:http", "65535"),
            ("http:https://127.0.0.1/", "http://"),
            ("http:example.com", "URL"),
            ("http://example.com/", "localhost"),
            ("log:(", "regular expression"),
            ("open:etc/passwd", "absolute"),
            ("uprobe:/bin/sh", "SYMBOL"),
            ("uprobe:/bin/sh:", "SYMBOL"),
            ("exit=256", "0 to 255"),
            ("exit:", "want tcp:PORT"),
        ] {
            let error = text.parse::<Probe>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(&format!("{text:?}")), "{text:?} gave {error}");
        }
    }

    #[test]
    fn requests_and_statuses() {
        let Ok(Probe::Http(http)) = "http:http://127.0.0.1:8080/a?b=c=204".parse() else {
            panic!("no http probe")
        };
        assert_eq!(
            (http.address(), http.host()),
            ((Ipv4Addr::LOCALHOST.into(), 8080), "127.0.0.1:8080".into())
        );
        assert_eq!(http.target(), "/a?b=c");
        assert!(http.accepts(204) && !http.accepts(200));
        let Ok(Probe::Http(http)) = "http://localhost".parse() else { panic!("no http probe") };
        assert!(http.accepts(200) && http.accepts(301) && !http.accepts(404) && !http.accepts(503));
    }
}
