//! A set of pages, one bit each.

use std::ops::Range;

use bitvec::prelude::{BitVec, Lsb0};

/// A set of page numbers below a fixed length; bit `n & 7` of byte `n >> 3` is page `n`.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct PageBitmap(BitVec<u64, Lsb0>);

impl PageBitmap {
    /// The empty set below `pages`.
    pub fn new(pages: u64) -> Self {
        Self(BitVec::repeat(false, pages as usize))
    }

    /// The set stored in `bytes`; bits at and past `pages` are ignored, missing bytes are zero.
    pub fn from_bytes(bytes: &[u8], pages: u64) -> Self {
        let mut words = vec![0u64; pages.div_ceil(64) as usize];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks(8)) {
            let mut le = [0; 8];
            le[..chunk.len()].copy_from_slice(chunk);
            *word = u64::from_le_bytes(le);
        }
        let mut bits = BitVec::from_vec(words);
        bits.truncate(pages as usize);
        let mut bitmap = Self(bits);
        bitmap.0.set_uninitialized(false);
        bitmap
    }

    /// The set as bytes, `ceil(len / 8)` of them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.0.as_raw_slice().iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.truncate(self.0.len().div_ceil(8));
        bytes
    }

    /// Page numbers are below this.
    pub fn len(&self) -> u64 {
        self.0.len() as u64
    }

    /// Whether no page can be in the set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes room for page numbers below `pages`; never shrinks.
    pub fn grow(&mut self, pages: u64) {
        if pages > self.len() {
            self.0.resize(pages as usize, false);
        }
    }

    /// Whether `page` is in the set; a page past the length is not.
    pub fn contains(&self, page: u64) -> bool {
        self.0.get(page as usize).is_some_and(|b| *b)
    }

    /// Whether any page of `range`, which must lie below [`len`](Self::len), is in the set.
    pub fn intersects(&self, range: Range<u64>) -> bool {
        self.0[range.start as usize..range.end as usize].any()
    }

    /// Adds `page`.
    ///
    /// # Panics
    /// When `page` is not below [`len`](Self::len).
    pub fn insert(&mut self, page: u64) {
        self.0.set(page as usize, true);
    }

    /// Adds every page of `range`, which must lie below [`len`](Self::len).
    pub fn insert_range(&mut self, range: Range<u64>) {
        self.0[range.start as usize..range.end as usize].fill(true);
    }

    /// Removes every page of `range`, which must lie below [`len`](Self::len).
    pub fn remove_range(&mut self, range: Range<u64>) {
        self.0[range.start as usize..range.end as usize].fill(false);
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.0.count_ones() as u64
    }

    /// The pages of `self` that are not in `other` (FlacIO's rt_diff).
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        let mut out = self.clone();
        let words = out.0.as_raw_mut_slice();
        for (word, theirs) in words.iter_mut().zip(other.0.as_raw_slice()) {
            *word &= !theirs;
        }
        out.0.set_uninitialized(false);
        out
    }

    /// The pages of the set in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter_ones().map(|n| n as u64)
    }

    /// The set as maximal runs of consecutive pages, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0usize;
        std::iter::from_fn(move || {
            let start = at + self.0[at..].first_one()?;
            let len = self.0[start..].first_zero().unwrap_or(self.0.len() - start);
            at = start + len;
            Some(start as u64..at as u64)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn bitmap(len: u64, pages: &BTreeSet<u64>) -> PageBitmap {
        let mut b = PageBitmap::new(len);
        for &page in pages {
            b.insert(page);
        }
        b
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(
            len in 1u64..700,
            a in proptest::collection::btree_set(0u64..700, 0..200),
            b in proptest::collection::btree_set(0u64..700, 0..200),
        ) {
            let a: BTreeSet<u64> = a.into_iter().filter(|p| *p < len).collect();
            let b: BTreeSet<u64> = b.into_iter().filter(|p| *p < len).collect();
            let (x, y) = (bitmap(len, &a), bitmap(len, &b));
            prop_assert_eq!(x.count(), a.len() as u64);
            prop_assert_eq!(x.iter().collect::<BTreeSet<_>>(), a.clone());
            prop_assert_eq!(x.runs().flatten().collect::<BTreeSet<_>>(), a.clone());
            prop_assert_eq!(x.difference(&y).iter().collect::<BTreeSet<_>>(), &a - &b);
            let middle = len / 3..len - len / 3;
            prop_assert_eq!(x.intersects(middle.clone()), a.range(middle).next().is_some());
            prop_assert_eq!(PageBitmap::from_bytes(&x.to_bytes(), len), x);
        }
    }

    #[test]
    fn difference_with_a_shorter_set_keeps_the_rest() {
        let all: BTreeSet<u64> = (0..200).collect();
        assert_eq!(bitmap(200, &all).difference(&bitmap(70, &(0..70).collect())).count(), 130);
        assert_eq!(bitmap(70, &(0..70).collect()).difference(&bitmap(200, &all)).count(), 0);
    }

    #[test]
    fn bits_past_the_length_are_ignored() {
        let b = PageBitmap::from_bytes(&[0xff, 0xff], 9);
        assert_eq!(b.count(), 9);
        assert_eq!(b.to_bytes(), [0xff, 0x01]);
    }
}
