//! rtpc
