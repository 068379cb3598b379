//! What the images are made of and how they are run.

/// An image: a chain of layers, and the services that it can run.
#[derive(Debug)]
pub struct Image {
    /// Its name, also of its layout and its repository.
    pub name: &'static str,
    /// Its uppermost layer.
    pub(super) layer: &'static str,
    /// Ways to run it; the command of the first one is the image's `Cmd`.
    pub services: &'static [Service],
}

/// One way to run an image.
#[derive(Clone, Copy, Debug)]
pub struct Service {
    /// Its name, for `--service`.
    pub name: &'static str,
    /// Program and arguments.
    pub command: &'static [&'static str],
    /// Its readiness, for `--ready`.
    pub ready: &'static str,
    /// The TCP port it listens on, on every address.
    pub port: u16,
}

pub(super) struct Layer {
    pub name: &'static str,
    /// Empty for the base.
    pub parent: &'static str,
    pub packages: &'static [&'static str],
    /// Shell commands, run in the image after the packages were installed.
    pub hook: &'static str,
}

/// Every image.
pub const IMAGES: &[Image] = &[
    Image {
        name: "nginx",
        layer: "nginx",
        services: &[Service {
            name: "nginx",
            command: &["nginx", "-g", "daemon off;"],
            ready: "http:http://127.0.0.1:80/",
            port: 80,
        }],
    },
    Image {
        name: "redis",
        layer: "redis",
        services: &[Service {
            name: "redis",
            command: &[
                "setpriv",
                "--reuid=redis",
                "--regid=redis",
                "--clear-groups",
                "redis-server",
                "--bind",
                "0.0.0.0",
                "--protected-mode",
                "no",
                "--dir",
                "/var/lib/redis",
            ],
            // It listens before it has read everything that it needs to answer.
            ready: "log:Ready to accept connections",
            port: 6379,
        }],
    },
    Image {
        name: "python",
        layer: "python",
        services: &[
            Service {
                name: "http",
                command: &["python3", "-m", "http.server", "8000", "--directory", "/srv"],
                ready: "http:http://127.0.0.1:8000/",
                port: 8000,
            },
            Service { name: "tls", command: &["python3", "-c", TLS], ready: "tcp:8001", port: 8001 },
        ],
    },
    Image {
        name: "pytorch",
        layer: "pytorch",
        services: &[Service {
            name: "pytorch",
            command: &["python3", "/app/ready.py"],
            ready: "tcp:8500",
            port: 8500,
        }],
    },
];

/// A second service of the python image: it shares the interpreter with the first one and brings its own modules.
const TLS: &str = "\
import json, socket, sqlite3, ssl
ssl.create_default_context()
json.loads('{}'); sqlite3.connect(':memory:').execute('select 1')
server = socket.create_server(('0.0.0.0', 8001))
while True: server.accept()[0].close()
";

pub(super) const LAYERS: &[Layer] = &[
    Layer { name: "base", parent: "", packages: &[], hook: "" },
    Layer {
        name: "nginx",
        parent: "base",
        packages: &["nginx"],
        hook: "ln -sf /dev/stdout /var/log/nginx/access.log; ln -sf /dev/stderr /var/log/nginx/error.log",
    },
    Layer { name: "redis", parent: "base", packages: &["redis-server"], hook: "" },
    Layer { name: "python", parent: "base", packages: &["python3"], hook: "" },
    Layer { name: "pytorch", parent: "python", packages: &["python3-torch"], hook: PYTORCH },
];

/// A program that is ready after one product of two matrices.
const PYTORCH: &str = "\
mkdir -p /app
cat > /app/ready.py <<'PROGRAM'
import torch, socket

ones = torch.ones(64, 64)
assert (ones @ ones).sum().item() == 64**3
server = socket.create_server(('0.0.0.0', 8500))
print('ready', flush=True)
while True:
    server.accept()[0].close()
PROGRAM
";

pub(super) const SUITE: &str = "bookworm";
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// No file is younger, in seconds since 1970. Python compiles its modules with checked hashes under a fixed date, so
/// that they stay valid although the times of their sources are clamped.
pub(super) const SOURCE_DATE_EPOCH: u64 = 1_700_000_000;
/// The same, as the image configuration spells it.
pub(super) const CREATED: &str = "2023-11-14T22:13:20Z";

/// Makes the base layer.
pub(super) const BASE: &str = include_str!("base.sh");
/// Makes any other layer.
pub(super) const INSTALL: &str = include_str!("install.sh");
