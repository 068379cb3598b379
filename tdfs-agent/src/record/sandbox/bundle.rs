//! The OCI runtime configuration of a container, from the image's own configuration.
//!
//! What a person knows from `docker run` holds: the entrypoint stays and arguments replace the command, docker's
//! default capabilities, masked paths and devices.

use std::path::{Path, PathBuf};

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::{
    Capabilities, Capability, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxDeviceCgroupBuilder,
    LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResourcesBuilder, MountBuilder, ProcessBuilder,
    RootBuilder, Spec, SpecBuilder, UserBuilder, get_default_mounts,
};

use super::accounts::{Accounts, Identity};
use super::{Network, SandboxError};

const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Docker's defaults.
const CAPABILITIES: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];

/// What the process in the container is.
#[derive(Clone, Copy, Debug)]
pub struct Workload<'a> {
    /// The image's configuration.
    pub configuration: &'a ImageConfiguration,
    /// Arguments in place of the image's `Cmd`; its `Entrypoint` stays.
    pub args: Option<&'a [String]>,
    /// The image's accounts, needed where `User` is more than numbers.
    pub accounts: Accounts<'a>,
    /// Network.
    pub network: Network,
}

/// The program and its arguments.
pub fn arguments(workload: &Workload<'_>) -> Result<Vec<String>, SandboxError> {
    let config = workload.configuration.config().as_ref();
    let entrypoint = config.and_then(|c| c.entrypoint().clone()).unwrap_or_default();
    let cmd = || config.and_then(|c| c.cmd().clone()).unwrap_or_default();
    let args = [entrypoint, workload.args.map_or_else(cmd, <[String]>::to_vec)].concat();
    if args.is_empty() {
        return Err(SandboxError::Configuration("the image has no command: give one after --".into()));
    }
    Ok(args)
}

/// The configuration of container `id`, whose root file system is mounted at `rootfs`.
pub fn spec(id: &str, rootfs: &Path, workload: &Workload<'_>) -> Result<Spec, SandboxError> {
    let bad = |e: oci_spec::OciSpecError| SandboxError::Configuration(e.to_string());
    let config = workload.configuration.config().as_ref();
    let user = config.and_then(|c| c.user().clone()).unwrap_or_default();
    let identity = workload.accounts.identity(&user)?;
    let cwd = config.and_then(|c| c.working_dir().clone()).filter(|d| !d.is_empty());

    let capabilities: Capabilities = CAPABILITIES.into_iter().collect();
    let root = identity.uid == 0;
    let effective = if root { capabilities.clone() } else { Capabilities::default() };
    let capabilities = LinuxCapabilitiesBuilder::default()
        .bounding(capabilities)
        .effective(effective.clone())
        .permitted(effective)
        .inheritable(Capabilities::default())
        .ambient(Capabilities::default())
        .build()
        .map_err(bad)?;
    let user = UserBuilder::default()
        .uid(identity.uid)
        .gid(identity.gid)
        .additional_gids(identity.groups.clone())
        .build()
        .map_err(bad)?;
    let mut process = ProcessBuilder::default()
        .terminal(false)
        .user(user)
        .args(arguments(workload)?)
        .env(environment(config.and_then(|c| c.env().clone()).unwrap_or_default(), id, &identity))
        .cwd(PathBuf::from(cwd.unwrap_or_else(|| "/".into())))
        .capabilities(capabilities)
        .no_new_privileges(false)
        .build()
        .map_err(bad)?;
    // Limits are inherited: raising one needs a capability that a caller may lack.
    process.set_rlimits(None);

    let mut mounts = get_default_mounts();
    let mut namespaces = vec![
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Uts,
        LinuxNamespaceType::Mount,
    ];
    match workload.network {
        Network::Private => namespaces.push(LinuxNamespaceType::Network),
        Network::Host => {
            for path in ["/etc/resolv.conf", "/etc/hosts"] {
                if Path::new(path).exists() {
                    let options = ["rbind", "rprivate", "ro"].map(str::to_owned).to_vec();
                    let mount = MountBuilder::default().destination(path).source(path).typ("bind");
                    mounts.push(mount.options(options).build().map_err(bad)?);
                }
            }
        }
    }
    let namespaces = namespaces
        .into_iter()
        .map(|typ| LinuxNamespaceBuilder::default().typ(typ).build())
        .collect::<Result<Vec<_>, _>>()
        .map_err(bad)?;
    let no_devices = LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build().map_err(bad)?;
    let resources = LinuxResourcesBuilder::default().devices(vec![no_devices]).build().map_err(bad)?;
    let linux = LinuxBuilder::default()
        .resources(resources)
        .namespaces(namespaces)
        .cgroups_path(Path::new("/tdfs").join(id))
        .build()
        .map_err(bad)?;
    let mut spec = SpecBuilder::default()
        .root(RootBuilder::default().path(rootfs).readonly(false).build().map_err(bad)?)
        .process(process)
        .hostname(id)
        .mounts(mounts)
        .linux(linux)
        .build()
        .map_err(bad)?;
    spec.set_version("1.0.2".into());
    Ok(spec)
}

/// The image's variables, and the three every program expects.
fn environment(mut env: Vec<String>, id: &str, identity: &Identity) -> Vec<String> {
    let has = |env: &[String], name: &str| env.iter().any(|v| v.split('=').next() == Some(name));
    for (name, value) in [
        ("PATH", DEFAULT_PATH.to_owned()),
        ("HOSTNAME", format!("HOSTNAME={id}")),
        ("HOME", format!("HOME={}", identity.home)),
    ] {
        if !has(&env, name) {
            env.push(value);
        }
    }
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(json: &str) -> ImageConfiguration {
        let rest =
            r#""architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},"history":[]"#;
        serde_json::from_str(&format!(r#"{{{rest},"config":{json}}}"#)).unwrap()
    }

    fn workload<'a>(configuration: &'a ImageConfiguration, args: Option<&'a [String]>) -> Workload<'a> {
        let accounts = Accounts { passwd: b"app:x:7:8::/srv/app:/bin/sh\n", group: b"" };
        Workload { configuration, args, accounts, network: Network::Private }
    }

    #[test]
    fn arguments_replace_the_command_and_keep_the_entrypoint() {
        let both = configuration(r#"{"Entrypoint":["/init"],"Cmd":["a","b"]}"#);
        assert_eq!(arguments(&workload(&both, None)).unwrap(), ["/init", "a", "b"]);
        let args = ["c".to_owned()];
        assert_eq!(arguments(&workload(&both, Some(&args))).unwrap(), ["/init", "c"]);
        assert!(arguments(&workload(&configuration("{}"), None)).is_err());
    }

    #[test]
    fn the_process_is_what_the_image_says() {
        let config = r#"{"Cmd":["x"],"User":"app","WorkingDir":"/w","Env":["A=1","HOME=/h"]}"#;
        let configuration = configuration(config);
        let spec = spec("c1", Path::new("/r"), &workload(&configuration, None)).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (7, 8));
        assert_eq!(process.cwd(), Path::new("/w"));
        let env = process.env().as_ref().unwrap();
        assert!(env.contains(&"A=1".into()) && env.contains(&"HOME=/h".into()));
        assert!(env.contains(&DEFAULT_PATH.to_owned()) && !env.contains(&"HOME=/srv/app".into()));
        let effective = process.capabilities().as_ref().unwrap().effective().clone().unwrap();
        assert!(effective.is_empty(), "only root keeps capabilities");
    }
}
