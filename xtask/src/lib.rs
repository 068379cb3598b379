//! What the developer commands and the end-to-end tests share: installing packages and building real images.

pub mod command;
pub mod images;
pub mod install;
