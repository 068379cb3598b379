//! tdfs: record, pack, fetch and serve runtime images.
//!
//! A module calls only modules to its left:
//! `tdfs-common <- oci <- rtpc <- fetch <- rootfs <- {record, pack} <- {node, registry} <- {agent, report} <- cli`.

pub mod agent;
pub mod cli;
pub mod fetch;
pub mod node;
pub mod oci;
pub mod pack;
pub mod record;
pub mod registry;
pub mod report;
pub mod rootfs;
pub mod rtpc;
