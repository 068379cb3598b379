//! Proof that some pages belong to a frame, without the others.
//!
//! A frame's hash is BLAKE3 over its uncompressed pages, and BLAKE3 is a tree: leaves are chunks of 1 KiB, and a node
//! over n chunks splits them after the largest power of two below n. Four chunks are a page, so every aligned page, and
//! every split above it, is a subtree. With some pages and the chaining values of the largest subtrees that hold none
//! of them, the root follows:
//!
//! ```text
//! frame of 5 pages, pages 1 and 2 wanted              root = frame hash
//!                                                    /    \
//!                                                   n      [4]       [x]  chaining value in the proof
//!                                                 /   \              (x)  page sent, its value computed
//!                                                n     n
//!                                               / \   / \            proof: [0] [3] [4], in the order of
//!                                             [0](1) (2)[3]          the pages they stand for
//! ```
//!
//! Which values a proof holds follows from the number of pages and the set, so it carries no structure of its own. A
//! set with all pages needs no value. Forging a page is finding a second preimage of BLAKE3.

use blake3::Hasher;
use blake3::hazmat::{ChainingValue, HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::digest::ContentHash;
use crate::page::PAGE_SIZE;
use crate::runtime_image::FRAME_PAGES;

/// Chaining values of a proof at most: every second page of a full frame is left out.
pub const VALUES_MAX: usize = FRAME_PAGES as usize / 2;

/// Pages of a frame: bit `n` is page `n`.
pub type PageSet = u64;

/// The set of all `pages` pages of a frame.
pub fn all(pages: u32) -> PageSet {
    if pages >= u64::BITS { PageSet::MAX } else { (1 << pages) - 1 }
}

/// The chaining values that lead from the pages in `set` to the hash of the frame with these uncompressed `pages`;
/// `None` unless they are 1 to [`FRAME_PAGES`] whole pages and `set` is a non-empty set of them.
pub fn prove(pages: &[u8], set: PageSet) -> Option<Vec<ChainingValue>> {
    let count = (pages.len() / PAGE_SIZE) as u32;
    if !pages.len().is_multiple_of(PAGE_SIZE) || !is_valid(count, set) {
        return None;
    }
    let mut proof = Vec::new();
    Subtree { first: 0, count }.left_out(set, &mut |subtree| proof.push(subtree.value(pages)));
    Some(proof)
}

/// The number of values in the proof for `set`, of a frame of `count` pages.
pub fn values(count: u32, set: PageSet) -> Option<usize> {
    let mut values = 0;
    is_valid(count, set).then(|| Subtree { first: 0, count }.left_out(set, &mut |_| values += 1))?;
    Some(values)
}

/// The hash of a frame of `count` pages of which `pages`, one after the other, are those in `set`; `None` unless
/// exactly these pages and the values for the others are given.
pub fn root(count: u32, set: PageSet, pages: &[u8], proof: &[ChainingValue]) -> Option<ContentHash> {
    if !is_valid(count, set)
        || pages.len() != set.count_ones() as usize * PAGE_SIZE
        || values(count, set) != Some(proof.len())
    {
        return None;
    }
    if set == all(count) {
        return Some(ContentHash::of(pages));
    }
    let mut given = Given { pages: pages.chunks_exact(PAGE_SIZE), proof: proof.iter() };
    // A set that leaves pages out has at least two subtrees.
    let (left, right) = Subtree { first: 0, count }.split();
    let (left, right) = (given.value(left, set)?, given.value(right, set)?);
    Some(ContentHash::from(merge_subtrees_root(&left, &right, Mode::Hash)))
}

fn is_valid(count: u32, set: PageSet) -> bool {
    (1..=FRAME_PAGES).contains(&count) && set != 0 && set & !all(count) == 0
}

/// Consecutive pages below one node.
#[derive(Clone, Copy)]
struct Subtree {
    first: u32,
    count: u32,
}

impl Subtree {
    /// Both children of a node over several pages.
    fn split(self) -> (Self, Self) {
        let left = self.count.next_power_of_two() / 2;
        (Self { count: left, ..self }, Self { first: self.first + left, count: self.count - left })
    }

    /// Those of `set` in this subtree.
    fn of(self, set: PageSet) -> PageSet {
        set >> self.first & all(self.count)
    }

    /// Calls `each` with the largest subtrees without a page of `set`.
    fn left_out(self, set: PageSet, each: &mut impl FnMut(Self)) {
        let mine = self.of(set);
        if mine == 0 {
            each(self);
        } else if mine != all(self.count) {
            let (left, right) = self.split();
            left.left_out(set, each);
            right.left_out(set, each);
        }
    }

    /// The chaining value, out of the pages of the whole frame.
    fn value(self, pages: &[u8]) -> ChainingValue {
        let bytes = &pages[self.first as usize * PAGE_SIZE..][..self.count as usize * PAGE_SIZE];
        chaining_value(self.first, bytes)
    }
}

fn chaining_value(first_page: u32, bytes: &[u8]) -> ChainingValue {
    let mut hasher = Hasher::new();
    hasher.set_input_offset(u64::from(first_page) * PAGE_SIZE as u64).update(bytes).finalize_non_root()
}

/// Pages and values that are still to be used.
struct Given<'a> {
    pages: std::slice::ChunksExact<'a, u8>,
    proof: std::slice::Iter<'a, ChainingValue>,
}

impl Given<'_> {
    fn value(&mut self, subtree: Subtree, set: PageSet) -> Option<ChainingValue> {
        if subtree.of(set) == 0 {
            return self.proof.next().copied();
        }
        if subtree.count == 1 {
            return Some(chaining_value(subtree.first, self.pages.next()?));
        }
        let (left, right) = subtree.split();
        let (left, right) = (self.value(left, set)?, self.value(right, set)?);
        Some(merge_subtrees_non_root(&left, &right, Mode::Hash))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(count: u32, seed: u8) -> Vec<u8> {
        let mut pages = vec![0; count as usize * PAGE_SIZE];
        Hasher::new().update(&[seed]).finalize_xof().fill(&mut pages);
        pages
    }

    fn cut(pages: &[u8], set: PageSet) -> Vec<u8> {
        let kept = pages.chunks(PAGE_SIZE).enumerate().filter(|(n, _)| set >> n & 1 == 1);
        kept.flat_map(|(_, page)| page).copied().collect()
    }

    #[test]
    fn every_size_and_every_single_page_leads_to_the_root() {
        for count in 1..=FRAME_PAGES {
            let pages = frame(count, count as u8);
            for set in (0..count).map(|n| 1 << n).chain([all(count)]) {
                let proof = prove(&pages, set).unwrap();
                assert_eq!(root(count, set, &cut(&pages, set), &proof), Some(ContentHash::of(&pages)));
                // One page of a balanced tree needs one value for each level.
                if count.is_power_of_two() && set != all(count) {
                    assert_eq!(proof.len(), count.ilog2() as usize);
                }
            }
        }
    }

    #[test]
    fn the_example() {
        let pages = frame(5, 1);
        let value = |n: u32| chaining_value(n, &pages[n as usize * PAGE_SIZE..][..PAGE_SIZE]);
        assert_eq!(prove(&pages, 0b00110).unwrap(), [value(0), value(3), value(4)]);
    }

    #[test]
    fn the_longest_proof_leaves_out_every_second_page() {
        assert_eq!(values(64, 0x5555_5555_5555_5555), Some(VALUES_MAX));
    }

    #[test]
    fn impossible_sets_are_refused() {
        let pages = frame(3, 0);
        for set in [0, 0b1000, 0b1001] {
            assert_eq!((prove(&pages, set), values(3, set)), (None, None));
            assert_eq!(root(3, set, &pages[..PAGE_SIZE], &[]), None);
        }
        assert_eq!(prove(&pages[1..], 1), None);
        assert_eq!((prove(&[], 1), prove(&frame(65, 0), 1)), (None, None));
        assert_eq!((root(0, 0, &[], &[]), root(65, 1, &pages[..PAGE_SIZE], &[])), (None, None));
    }

    proptest! {
        #[test]
        fn any_cut_leads_to_the_root_and_any_damage_elsewhere(
            count in 1..=FRAME_PAGES,
            set in any::<u64>(),
            seed in any::<u8>(),
            at in any::<proptest::sample::Index>(),
            flip in 1u8..,
            other in any::<u64>(),
        ) {
            let set = set & all(count);
            prop_assume!(set != 0);
            let pages = frame(count, seed);
            let hash = ContentHash::of(&pages);
            let (proof, sent) = (prove(&pages, set).unwrap(), cut(&pages, set));
            prop_assert_eq!(values(count, set), Some(proof.len()));
            prop_assert!(proof.len() <= VALUES_MAX);
            prop_assert_eq!(root(count, set, &sent, &proof), Some(hash));

            let mut damaged = sent.clone();
            damaged[at.index(sent.len())] ^= flip;
            prop_assert_ne!(root(count, set, &damaged, &proof), Some(hash));
            if !proof.is_empty() {
                let mut forged = proof.clone();
                forged[at.index(proof.len())][at.index(32)] ^= flip;
                prop_assert_ne!(root(count, set, &sent, &forged), Some(hash));
                prop_assert_eq!(root(count, set, &sent, &proof[1..]), None);
            }
            let longer = [&proof[..], &[[flip; 32]]].concat();
            prop_assert_eq!(root(count, set, &sent, &longer), None);
            prop_assert_eq!(root(count, set, &sent[1..], &proof), None);
            // The same bytes as other pages.
            let other = other & all(count);
            if other != set {
                prop_assert_ne!(root(count, other, &sent, &proof), Some(hash));
            }
        }
    }
}
