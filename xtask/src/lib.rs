//! What the developer commands and the end-to-end tests share: installing packages, building real images, running the
//! registry and the containerd that tdfs is compared with.

pub mod command;
pub mod containerd;
mod daemon;
pub mod ebpf;
pub mod images;
pub mod install;
pub mod network;
pub mod ready;
pub mod registry;
pub mod table;
pub mod tools;
