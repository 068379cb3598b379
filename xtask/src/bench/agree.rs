//! Whether two runs of `bench cold` agree: each says of its rows how far they may be from what many starts would tell.
//!
//! Two rows agree if the spreads of *÷ floor* overlap. Where nothing differs but chance they do not in one of ten rows with
//! three starts in each run, in one of 126 with five, and in one of 462 with six (2 / C(2n, n)).

use std::path::Path;

use anyhow::{Result, ensure};
use xtask::table::Table;

use super::report::{Results, Row, shown, shown_spread};
use super::statistics::{median, spread};

/// Prints the rows that both runs have, and how many agree.
pub fn run(first: &Path, second: &Path) -> Result<()> {
    let (first, second) = (Results::read(first)?, Results::read(second)?);
    let (first, second) = (first.rows(), second.rows());
    let both = pairs(&first, &second);
    ensure!(!both.is_empty(), "no row with a warm start beside it is in both");
    let mut table = Table::new(&["image, link, method", "÷ floor", "spread", "÷ floor", "spread", "agree"]);
    let mut agreeing = 0;
    for (a, b) in &both {
        let of = |row: &Row<'_>| [shown(median(&row.to_floor), 2), shown_spread(&row.to_floor, 2)];
        let agree = agree(&a.to_floor, &b.to_floor);
        agreeing += usize::from(agree);
        let said = if agree { "yes" } else { "no" };
        table.row(&a.name(), of(a).into_iter().chain(of(b)).chain([said.to_owned()]));
    }
    println!("{table}\n{agreeing} of {} rows agree", both.len());
    Ok(())
}

/// The rows of both; of warm starts alone there is nothing to compare.
fn pairs<'a, 'r>(first: &'a [Row<'r>], second: &'a [Row<'r>]) -> Vec<(&'a Row<'r>, &'a Row<'r>)> {
    let same = |a: &Row<'_>| second.iter().find(|b| a.name() == b.name());
    let both = first.iter().filter_map(|a| Some((a, same(a)?)));
    both.filter(|(a, b)| !a.is_warm() && !a.to_floor.is_empty() && !b.to_floor.is_empty()).collect()
}

fn agree(a: &[f64], b: &[f64]) -> bool {
    let ((a_low, a_high), (b_low, b_high)) = (spread(a), spread(b));
    a_low <= b_high && b_low <= a_high
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_spreads_agree() {
        assert!(agree(&[1.0, 1.2], &[1.1, 1.3]) && agree(&[1.0, 2.0], &[1.5]) && agree(&[1.5], &[1.0, 2.0]));
        assert!(!agree(&[1.0, 1.2], &[1.3, 1.4]) && !agree(&[1.3, 1.4], &[1.0, 1.2]));
    }
}
