//! Layers on top of each other: the file system an unpacker would leave behind.
//!
//! Entries apply in order, lowest layer first, as containerd and umoci unpack them:
//! - A later entry replaces an earlier one; a directory over a directory keeps the children and takes the new
//!   metadata, attributes included.
//! - Symbolic links in the parents of a path are followed inside the root; missing parents become directories
//!   of root's, 0755, at the epoch. A file in the place of a parent is an error.
//! - The last component is never followed, so an entry replaces a link and not what it points to.
//! - A hard link is a name and no metadata; its target must exist and not be a directory.
//! - Whiteouts remove what lower layers left, never what their own layer brings, wherever in the layer they
//!   stand; one of a missing path does nothing.

use std::collections::BTreeMap;

use tdfs_common::envelope::Format;
use tdfs_common::tree::{Body, DirEntry, INODES_MAX, Inode, Tree};

use super::{EntryKind, IndexedLayer, LayerError, implied_directory};

/// Symbolic links followed on the way to one entry.
const LINKS_MAX: u32 = 255;
/// Directory steps of a merge that every entry pays for, and what is free; hostile links and whiteouts could ask for
/// any number.
const STEPS_PER_ENTRY: u64 = 64;
const STEPS_FREE: u64 = 1 << 22;

/// Merges `layers`, lowest first, into a tree that satisfies its format.
pub fn merge(layers: &[IndexedLayer]) -> Result<Tree, LayerError> {
    let entries: usize = layers.iter().map(|l| l.entries.len()).sum();
    let limit = STEPS_FREE + STEPS_PER_ENTRY * entries as u64;
    let mut merge = Merge { nodes: vec![Node::new(implied_directory())], layer: 0, steps: limit };
    for layer in layers {
        merge.layer += 1;
        for entry in &layer.entries {
            merge.apply(&entry.path, &entry.kind).map_err(|error| match error {
                Failure::Entry(reason) => LayerError::entry(&entry.path, reason),
                Failure::Steps => LayerError::TooLarge { what: "directories to search", limit },
            })?;
        }
    }
    let tree = Tree { inodes: merge.number()?, layer_sizes: layers.iter().map(|l| l.layer.size).collect() };
    tree.validate()?;
    Ok(tree)
}

enum Failure {
    Entry(&'static str),
    Steps,
}

/// An inode under construction.
struct Node {
    inode: Inode,
    /// Of a directory.
    names: BTreeMap<Vec<u8>, Name>,
    /// The last layer that put something below this directory.
    layer: u32,
}

/// A directory's entry.
#[derive(Clone, Copy)]
struct Name {
    node: usize,
    /// The layer that brought the name, 1 being the lowest.
    layer: u32,
}

impl Node {
    fn new(inode: Inode) -> Self {
        Self { inode, names: BTreeMap::new(), layer: 0 }
    }

    fn is_directory(&self) -> bool {
        matches!(self.inode.body, Body::Directory(_))
    }
}

struct Merge {
    nodes: Vec<Node>,
    layer: u32,
    /// Left to take.
    steps: u64,
}

impl Merge {
    fn apply(&mut self, path: &[u8], kind: &EntryKind) -> Result<(), Failure> {
        let split = path.iter().rposition(|b| *b == b'/');
        let (parent, name) = split.map_or((&path[..0], path), |at| (&path[..at], &path[at + 1..]));
        match kind {
            EntryKind::Inode(inode) if path.is_empty() => {
                self.nodes[0].inode = inode.clone();
            }
            _ if path.is_empty() && !matches!(kind, EntryKind::Opaque) => {
                return Err(Failure::Entry("the root must be a directory"));
            }
            EntryKind::Inode(inode) => {
                let dir = self.make_directory(parent)?;
                self.put(dir, name, inode);
            }
            EntryKind::HardLink(target) => {
                let dir = self.make_directory(parent)?;
                self.nodes[dir].names.remove(name);
                let node = self.find(target)?.ok_or(Failure::Entry("hard link to a missing file"))?;
                if self.nodes[node].is_directory() {
                    return Err(Failure::Entry("hard link to a directory"));
                }
                self.nodes[dir].names.insert(name.to_vec(), Name { node, layer: self.layer });
            }
            EntryKind::Whiteout => {
                if let Some(dir) = self.descend(parent, false)? {
                    self.hide(dir, Some(name))?;
                }
            }
            EntryKind::Opaque => {
                if let Some(dir) = self.descend(path, false)? {
                    self.hide(dir, None)?;
                }
            }
        }
        Ok(())
    }

    /// Puts an inode at a name; metadata only, where both it and what is there are directories.
    fn put(&mut self, dir: usize, name: &[u8], inode: &Inode) {
        let mut inode = inode.clone();
        if let Body::Regular { extents, .. } = &mut inode.body {
            for extent in extents {
                extent.layer = self.layer - 1;
            }
        }
        let there = self.nodes[dir].names.get(name).map(|n| n.node);
        let node = match there {
            Some(node) if self.nodes[node].is_directory() && matches!(inode.body, Body::Directory(_)) => {
                self.nodes[node].inode = inode;
                node
            }
            _ => {
                self.nodes.push(Node::new(inode));
                self.nodes.len() - 1
            }
        };
        self.nodes[dir].names.insert(name.to_vec(), Name { node, layer: self.layer });
    }

    fn make_directory(&mut self, path: &[u8]) -> Result<usize, Failure> {
        // With `create`, nothing is missing.
        Ok(self.descend(path, true)?.unwrap_or(0))
    }

    /// The inode at `path`, the last component not followed.
    fn find(&mut self, path: &[u8]) -> Result<Option<usize>, Failure> {
        let split = path.iter().rposition(|b| *b == b'/');
        let (parent, name) = split.map_or((&path[..0], path), |at| (&path[..at], &path[at + 1..]));
        if path.is_empty() {
            return Ok(Some(0));
        }
        let dir = self.descend(parent, false)?;
        Ok(dir.and_then(|dir| self.nodes[dir].names.get(name)).map(|n| n.node))
    }

    /// The directory at `path`, links followed. With `create`, missing directories are made and the way is marked
    /// as this layer's, and anything but a directory in the way is an error; else it means there is none.
    fn descend(&mut self, path: &[u8], create: bool) -> Result<Option<usize>, Failure> {
        let mut links = 0;
        let mut chain = vec![0usize];
        let mut todo: Vec<Vec<u8>> = components(path);
        while let Some(name) = todo.pop() {
            self.step(1)?;
            let dir = chain[chain.len() - 1];
            if name == b".." {
                if chain.len() > 1 {
                    chain.pop();
                }
                continue;
            }
            let node = match self.nodes[dir].names.get(&name) {
                Some(name) => name.node,
                None if create => {
                    self.put(dir, &name, &implied_directory());
                    self.nodes.len() - 1
                }
                None => return Ok(None),
            };
            match &self.nodes[node].inode.body {
                Body::Directory(_) => chain.push(node),
                Body::Symlink(target) => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(Failure::Entry("too many symbolic links"));
                    }
                    if target.first() == Some(&b'/') {
                        chain.truncate(1);
                    }
                    todo.extend(components(target));
                }
                _ if create => return Err(Failure::Entry("a parent is not a directory")),
                _ => return Ok(None),
            }
        }
        if create {
            for dir in &chain {
                self.nodes[*dir].layer = self.layer;
            }
        }
        Ok(chain.pop())
    }

    /// Removes what lower layers left: one name of the directory, or all of them. What this layer brought stays,
    /// and so do the directories on the way to it.
    fn hide(&mut self, dir: usize, only: Option<&[u8]>) -> Result<(), Failure> {
        let mut todo = Vec::new();
        let hide = |nodes: &[Node], layer: u32, name: &Name, todo: &mut Vec<usize>| {
            let node = &nodes[name.node];
            let ours = name.layer == layer || (node.is_directory() && node.layer == layer);
            if ours && node.is_directory() {
                todo.push(name.node);
            }
            ours
        };
        let layer = self.layer;
        if let Some(name) = only {
            let there = self.nodes[dir].names.get(name).copied();
            if there.is_some_and(|there| !hide(&self.nodes, layer, &there, &mut todo)) {
                self.nodes[dir].names.remove(name);
            }
        } else {
            todo.push(dir);
        }
        while let Some(dir) = todo.pop() {
            let mut names = std::mem::take(&mut self.nodes[dir].names);
            let steps = names.len() as u64;
            names.retain(|_, name| hide(&self.nodes, layer, name, &mut todo));
            self.nodes[dir].names = names;
            self.step(1 + steps)?;
        }
        Ok(())
    }

    fn step(&mut self, n: u64) -> Result<(), Failure> {
        self.steps = self.steps.checked_sub(n).ok_or(Failure::Steps)?;
        Ok(())
    }

    /// Numbers what can be reached, parents first, names in order.
    fn number(self) -> Result<Vec<Inode>, LayerError> {
        const NONE: u32 = u32::MAX;
        let mut numbers = vec![NONE; self.nodes.len()];
        let mut order = Vec::new();
        let mut stack = vec![0];
        while let Some(node) = stack.pop() {
            if numbers[node] == NONE {
                numbers[node] = order.len() as u32;
                order.push(node);
                stack.extend(self.nodes[node].names.values().rev().map(|n| n.node));
            }
            if order.len() > INODES_MAX {
                return Err(LayerError::TooLarge { what: "inodes in all layers", limit: INODES_MAX as u64 });
            }
        }
        let mut nodes: Vec<Option<Node>> = self.nodes.into_iter().map(Some).collect();
        let inodes = order.into_iter().filter_map(|node| {
            let Node { mut inode, names, .. } = nodes[node].take()?;
            if let Body::Directory(entries) = &mut inode.body {
                *entries =
                    names.into_iter().map(|(name, n)| DirEntry { name, ino: numbers[n.node] }).collect();
            }
            Some(inode)
        });
        Ok(inodes.collect())
    }
}

/// Components of `path`, last first, without empty ones and `.`.
fn components(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|b| *b == b'/').filter(|n| !n.is_empty() && *n != b".").rev().map(<[u8]>::to_vec).collect()
}
