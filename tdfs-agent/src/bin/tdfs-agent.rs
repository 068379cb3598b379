//! `tdfs-agent`, the node daemon.

fn main() -> std::process::ExitCode {
    tdfs_agent::cli::agent()
}
