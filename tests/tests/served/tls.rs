//! TLS with the certificate of a private CA, all the way to the pages.

use std::fs;

use anyhow::{Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tdfs_tests::images::{self, recipe};
use tdfs_tests::server::Server;
use tdfs_tests::tdfs;
use tempfile::TempDir;

use crate::{number, source};

/// Writes a CA's certificate as `NAME.pem`, and a certificate for 127.0.0.1 that it signed with its key.
fn authority(dir: &TempDir, name: &str) -> Result<()> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec!["127.0.0.1".into()])?.signed_by(&key, &ca)?;
    fs::write(dir.path().join(format!("{name}.pem")), ca.pem())?;
    fs::write(dir.path().join(format!("{name}-server.pem")), certificate.pem())?;
    fs::write(dir.path().join(format!("{name}-server.key")), key.serialize_pem())?;
    Ok(())
}

#[test]
fn pages_come_over_tls_or_not_at_all() -> Result<()> {
    let dir = TempDir::with_prefix("tdfs-tls-")?;
    authority(&dir, "ours")?;
    authority(&dir, "others")?;
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (ours, others, root) = (path("ours.pem"), path("others.pem"), dir.path().join("root"));
    let plain = Server::start(&root, &[])?;
    plain.push(&images::image("nginx")?, "team/nginx:latest")?;
    let (certificate, key) = (path("ours-server.pem"), path("ours-server.key"));
    let server = Server::start(&root, &["--tls-cert", &certificate, "--tls-key", &key])?;
    let image = server.image("team/nginx:latest");
    let tls = ["--plain-http=false", "--ca-file", &ours];
    let service = &recipe("nginx")?.services[0];
    let (recorder, node) = (path("recorder"), path("node"));
    let record = ["record", &image, "--service", service.name, "--ready", service.ready, "--push"];
    tdfs::json(record.into_iter().chain(["--state", &recorder]).chain(tls))?;

    let run = |image: &str, node: &str, more: &[&str]| {
        let run = ["run", image, "--exit-when-ready", "--network", "private", "--state", node];
        run.iter().chain(&["--start", "fetched"]).chain(more).map(|a| (*a).to_owned()).collect::<Vec<_>>()
    };
    let cold = tdfs::json(run(&image, &node, &tls))?;
    ensure!(number(&cold, "data_requests")? + number(&cold, "metadata_requests")? == 1, "{cold}");
    ensure!(number(source(&cold, "page_service"), "pages")? == number(&cold, "pages_needed")?, "{cold}");

    // As a mirror of somebody else.
    let (mirror, elsewhere) = (format!("https://{}", server.addr), plain.image("team/nginx:latest"));
    let more = ["--mirror", &mirror, "--ca-file", &ours];
    let mirrored = tdfs::json(run(&elsewhere, &path("mirrored"), &more))?;
    ensure!(number(source(&mirrored, "mirror"), "pages")? > 0, "{mirrored}");
    ensure!(source(&mirrored, "page_service").is_null(), "{mirrored}");

    // Nobody whom we know has signed it.
    let (strange, node) = (server.image("strange/image:latest"), path("stranger"));
    for more in [&["--plain-http=false"][..], &["--plain-http=false", "--ca-file", &others]] {
        let error = tdfs::error(run(&strange, &node, more))?;
        let named = error.contains(&server.addr.to_string());
        ensure!(named && error.contains("invalid peer certificate"), "{error}");
    }
    // A mirror that cannot prove who it is is no mirror.
    let more = ["--mirror", &mirror, "--ca-file", &others];
    let unmirrored = tdfs::json(run(&elsewhere, &path("unmirrored"), &more))?;
    ensure!(number(source(&unmirrored, "page_service"), "pages")? > 0, "{unmirrored}");
    // Who is told to speak TLS does not speak anything else.
    let error = tdfs::error(run(&plain.image("strange/image:latest"), &node, &tls))?;
    ensure!(error.contains(&plain.addr.to_string()) && error.contains("corrupt message"), "{error}");
    for server in [server, plain] {
        ensure!(!server.log().iter().any(|line| line.contains("strange/image")), "a request was sent");
    }
    Ok(())
}
