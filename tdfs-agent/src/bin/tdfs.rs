//! `tdfs`, for people and CI.

fn main() -> std::process::ExitCode {
    tdfs_agent::cli::main()
}
