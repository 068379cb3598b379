//! How a start goes through the image: its files, in the order of first use.
//!
//! A trace has no times, it has an order: the page that was touched first, second, and so on. The strip of a file says
//! where in this order its pages come.

use std::cmp::Reverse;
use std::collections::HashMap;

use serde::Serialize;
use tdfs_common::runtime_image::Service;

use super::recording::SERVICES_SHOWN;

/// Files with a line of their own.
const FILES_MAX: usize = 18;
/// Parts into which a strip divides the order.
const STRIP: u64 = 128;

/// The order of first use of one service.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FirstUse {
    /// Service name.
    pub service: String,
    /// File pages.
    pub pages: u64,
    /// The files with the most pages, the one that was used first before the others; the last line holds all others.
    pub lines: Vec<FileOrder>,
}

/// When the pages of a file were first used.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FileOrder {
    /// Path without a leading slash; `None` for all the others.
    pub path: Option<String>,
    /// Files.
    pub files: u64,
    /// Their pages.
    pub pages: u64,
    /// For each part of the order, which share of it are pages of these files, `0` none to `9` all.
    pub strip: String,
}

/// Pages by part of the order.
#[derive(Clone)]
struct Line {
    first: u64,
    pages: u64,
    parts: Vec<u64>,
}

/// The orders of the services that the report tells apart, with the paths of all inodes.
pub fn orders(services: &[Service], paths: &[Vec<u8>]) -> Vec<FirstUse> {
    services.iter().take(SERVICES_SHOWN).map(|service| order(service, paths)).collect()
}

fn order(service: &Service, paths: &[Vec<u8>]) -> FirstUse {
    let all = service.file_pages();
    let start_of = |part: u64| all * part / STRIP;
    let mut lines: HashMap<u32, Line> = HashMap::new();
    let mut at = 0;
    for run in &service.runs {
        let end = at + u64::from(run.count);
        let none = || Line { first: at, pages: 0, parts: vec![0; STRIP as usize] };
        let line = lines.entry(run.ino).or_insert_with(none);
        line.pages += u64::from(run.count);
        // The part that a page lies in: the last one that does not start behind it.
        let mut part = (at * STRIP / all).min(STRIP - 1);
        while part + 1 < STRIP && start_of(part + 1) <= at {
            part += 1;
        }
        while at < end {
            let stop = if part + 1 < STRIP { end.min(start_of(part + 1)) } else { end };
            line.parts[part as usize] += stop - at;
            at = stop;
            part += 1;
        }
    }
    let strip = |parts: &[u64]| {
        let digit = |(part, pages): (usize, &u64)| {
            let size = start_of(part as u64 + 1) - start_of(part as u64);
            // Some is never shown as nothing.
            char::from(b'0' + (pages * 9).div_ceil(size.max(1)).min(9) as u8)
        };
        parts.iter().enumerate().map(digit).collect()
    };
    let mut lines: Vec<(u32, Line)> = lines.into_iter().collect();
    lines.sort_by_key(|(ino, line)| (Reverse(line.pages), *ino));
    let others = lines.split_off(lines.len().min(FILES_MAX));
    lines.sort_by_key(|(_, line)| line.first);
    let own = |(ino, line): &(u32, Line)| FileOrder {
        path: Some(String::from_utf8_lossy(&paths[*ino as usize]).into_owned()),
        files: 1,
        pages: line.pages,
        strip: strip(&line.parts),
    };
    let mut drawn: Vec<FileOrder> = lines.iter().map(own).collect();
    if !others.is_empty() {
        let mut parts = vec![0; STRIP as usize];
        for (_, line) in &others {
            parts.iter_mut().zip(&line.parts).for_each(|(sum, pages)| *sum += pages);
        }
        drawn.push(FileOrder {
            path: None,
            files: others.len() as u64,
            pages: others.iter().map(|(_, line)| line.pages).sum(),
            strip: strip(&parts),
        });
    }
    FirstUse { service: service.service.clone(), pages: all, lines: drawn }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::report::recording::tests::service;

    proptest! {
        #[test]
        fn every_page_is_in_one_line_and_where_it_was_used(
            runs in prop::collection::vec((0u32..40, 1u32..60), 0..80),
        ) {
            let mut web = service("web", &runs, 2000);
            for (run, (ino, _)) in web.runs.iter_mut().zip(&runs) {
                run.ino = *ino;
            }
            let paths: Vec<Vec<u8>> = (0..40).map(|n: u32| n.to_string().into_bytes()).collect();
            let found = &orders(std::slice::from_ref(&web), &paths)[0];
            let used: Vec<u32> = runs.iter().flat_map(|&(ino, count)| vec![ino; count as usize]).collect();
            prop_assert_eq!(found.pages, used.len() as u64);
            prop_assert_eq!(found.lines.iter().map(|l| l.pages).sum::<u64>(), found.pages);
            prop_assert!(found.lines.len() <= FILES_MAX + 1);
            for line in found.lines.iter().filter(|l| l.path.is_some()) {
                let ino: u32 = line.path.as_ref().unwrap().parse().unwrap();
                prop_assert_eq!(line.pages, used.iter().filter(|u| **u == ino).count() as u64);
                for (part, digit) in line.strip.bytes().enumerate() {
                    let at = |part: usize| used.len() * part / STRIP as usize;
                    let here = &used[at(part)..at(part + 1)];
                    let pages = here.iter().filter(|u| **u == ino).count();
                    prop_assert_eq!(digit == b'0', pages == 0);
                    prop_assert_eq!(digit == b'9', pages > 0 && pages * 9 > 8 * here.len());
                }
            }
        }
    }
}
