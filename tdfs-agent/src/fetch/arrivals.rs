//! What is under way: pages on their way into a zone, and who waits for them.
//!
//! ```text
//! fetch --arrive(pages)--> Arrivals --wakes exactly those--> readers in wait(pages)
//!       <---demands()-----          <---a wait for what is not there is a demand---
//! ```
//!
//! One fetch brings pages and any number of readers wait. A page is announced after its verified bytes are in the zone
//! file, so a reader that returns from [`wait`](Arrivals::wait) may read them there. A fetch that is over without having
//! brought everything fails whoever waits, and everyone who comes later: no wait outlives the fetch.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tdfs_common::bitmap::PageBitmap;
use tokio::sync::{Notify, oneshot, watch};

/// Zone pages that are awaited, shared by the fetch that brings them and their readers.
#[derive(Debug)]
pub struct Arrivals {
    state: Mutex<State>,
    /// Pages awaited in the beginning.
    total: u64,
    demanded: Notify,
    news: watch::Sender<News>,
    /// Every page has arrived. Not part of the news, so that who waits for it is woken once.
    complete: watch::Sender<bool>,
    cancelled: watch::Sender<bool>,
}

/// How far a fetch is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Awaited pages that have arrived.
    pub arrived: u64,
    /// No more will come.
    pub over: bool,
}

#[derive(Debug)]
struct State {
    awaited: PageBitmap,
    /// Readers, by the first page that each lacks. Waking one is dropping its sender.
    waiting: BTreeMap<u64, Vec<oneshot::Sender<()>>>,
    demands: Vec<Range<u64>>,
    failed: Option<i32>,
}

impl Arrivals {
    /// Nothing of `awaited` has arrived yet; every other page is there.
    pub fn new(awaited: PageBitmap) -> Self {
        let total = awaited.count();
        let state = State { awaited, waiting: BTreeMap::new(), demands: Vec::new(), failed: None };
        Self {
            state: Mutex::new(state),
            total,
            demanded: Notify::new(),
            news: watch::Sender::default(),
            complete: watch::Sender::new(total == 0),
            cancelled: watch::Sender::default(),
        }
    }

    /// The pages that have not arrived.
    pub fn awaited(&self) -> PageBitmap {
        self.state().awaited.clone()
    }

    /// Whether a page of `pages` has not arrived.
    pub fn awaits(&self, pages: Range<u64>) -> bool {
        self.state().first_awaited(&pages).is_some()
    }

    /// Waits until all of `pages` are in the zone file, and makes them wanted first. Fails with the errno of the fetch
    /// that will not bring them.
    pub async fn wait(&self, pages: &[Range<u64>]) -> Result<(), i32> {
        self.wait_for(pages, true).await
    }

    /// Waits like [`wait`](Self::wait), without making anything wanted first.
    pub async fn expect(&self, pages: &[Range<u64>]) -> Result<(), i32> {
        self.wait_for(pages, false).await
    }

    async fn wait_for(&self, pages: &[Range<u64>], mut demand: bool) -> Result<(), i32> {
        loop {
            let woken = {
                let mut state = self.state();
                let Some(first) = pages.iter().find_map(|p| state.first_awaited(p)) else { return Ok(()) };
                if let Some(errno) = state.failed {
                    return Err(errno);
                }
                if demand {
                    state.demands.extend(pages.iter().cloned());
                }
                let (wake, woken) = oneshot::channel();
                let waiting = state.waiting.entry(first).or_default();
                waiting.retain(|w| !w.is_closed());
                waiting.push(wake);
                woken
            };
            if std::mem::take(&mut demand) {
                self.demanded.notify_one();
            }
            let _ = woken.await;
        }
    }

    /// Waits for demands and takes them: pages that somebody waits for, and that may have arrived meanwhile.
    pub async fn demands(&self) -> Vec<Range<u64>> {
        loop {
            let demands = std::mem::take(&mut self.state().demands);
            if !demands.is_empty() {
                return demands;
            }
            self.demanded.notified().await;
        }
    }

    /// `pages` are in the zone file, verified.
    pub fn arrive(&self, pages: Range<u64>) {
        let woken;
        {
            let mut state = self.state();
            let end = pages.end.min(state.awaited.len());
            let pages = pages.start.min(end)..end;
            let count = pages.clone().filter(|p| state.awaited.contains(*p)).count();
            if count == 0 {
                return;
            }
            state.awaited.remove_range(pages.clone());
            let mut rest = state.waiting.split_off(&pages.start);
            state.waiting.append(&mut rest.split_off(&pages.end));
            woken = rest;
            self.news.send_modify(|news| news.arrived += count as u64);
            if self.news.borrow().arrived == self.total {
                self.complete.send_replace(true);
            }
        }
        drop(woken);
    }

    /// No page will arrive any more; readers of those that lack get `errno`. The first call decides which.
    pub fn fail(&self, errno: i32) {
        let woken;
        {
            let mut state = self.state();
            state.failed.get_or_insert(errno);
            woken = std::mem::take(&mut state.waiting);
            state.demands.clear();
            self.news.send_modify(|news| news.over = true);
        }
        drop(woken);
    }

    /// Tells the fetch to end now.
    pub fn cancel(&self) {
        self.cancelled.send_replace(true);
    }

    /// Waits for [`cancel`](Self::cancel). (Waiting for news fails only without a sender, and we hold it.)
    pub async fn cancelled(&self) {
        let _ = self.cancelled.subscribe().wait_for(|cancelled| *cancelled).await;
    }

    /// Waits until every awaited page has arrived.
    pub async fn complete(&self) {
        let _ = self.complete.subscribe().wait_for(|complete| *complete).await;
    }

    /// How far it is, now and whenever that changes.
    pub fn news(&self) -> watch::Receiver<News> {
        self.news.subscribe()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn first_awaited(&self, pages: &Range<u64>) -> Option<u64> {
        pages.clone().find(|p| self.awaited.contains(*p))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::task::{Context, Poll, Wake, Waker};

    use futures_util::FutureExt as _;
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 40;

    #[derive(Clone, Debug)]
    enum Step {
        Wait(Vec<Range<u64>>, bool),
        Arrive(Range<u64>),
        GiveUpWaiting(prop::sample::Index),
        TakeDemands,
        Fail(i32),
    }

    fn pages() -> impl Strategy<Value = Range<u64>> {
        (0..PAGES, 1u64..12).prop_map(|(start, len)| start..(start + len).min(PAGES))
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (prop::collection::vec(pages(), 1..4), any::<bool>()).prop_map(|(p, d)| Step::Wait(p, d)),
            4 => pages().prop_map(Step::Arrive),
            1 => any::<prop::sample::Index>().prop_map(Step::GiveUpWaiting),
            1 => Just(Step::TakeDemands),
            1 => (1i32..5).prop_map(Step::Fail),
        ]
    }

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    struct Reader<'a> {
        pages: Vec<Range<u64>>,
        wait: Pin<Box<dyn Future<Output = Result<(), i32>> + 'a>>,
        woken: Arc<Woken>,
    }

    impl Reader<'_> {
        fn poll(&mut self) -> Poll<Result<(), i32>> {
            self.woken.0.store(false, Ordering::Relaxed);
            self.wait.as_mut().poll(&mut Context::from_waker(&Waker::from(Arc::clone(&self.woken))))
        }

        fn first(&self, awaited: &BTreeSet<u64>) -> Option<u64> {
            self.pages.iter().cloned().flatten().find(|p| awaited.contains(p))
        }
    }

    proptest! {
        #[test]
        fn readers_are_woken_for_their_pages_only(
            start in prop::collection::btree_set(0..PAGES, 0..PAGES as usize),
            steps in prop::collection::vec(step(), 0..60),
        ) {
            let mut bitmap = PageBitmap::new(PAGES);
            for page in &start {
                bitmap.insert(*page);
            }
            let arrivals = Arrivals::new(bitmap);
            let (mut awaited, mut failed, mut demanded) = (start.clone(), None, BTreeSet::new());
            let mut readers: Vec<Reader<'_>> = Vec::new();
            for step in steps {
                let before = awaited.clone();
                match step {
                    Step::Wait(pages, demand) => {
                        let wanted = pages.clone();
                        let arrivals = &arrivals;
                        let wait = Box::pin(async move { arrivals.wait_for(&wanted, demand).await });
                        let mut reader = Reader { pages, wait, woken: Arc::default() };
                        match (reader.first(&awaited), failed) {
                            (None, _) => prop_assert_eq!(reader.poll(), Poll::Ready(Ok(()))),
                            (_, Some(errno)) => prop_assert_eq!(reader.poll(), Poll::Ready(Err(errno))),
                            _ => {
                                prop_assert_eq!(reader.poll(), Poll::Pending);
                                if demand {
                                    demanded.extend(reader.pages.iter().cloned().flatten());
                                }
                                readers.push(reader);
                            }
                        }
                    }
                    Step::Arrive(pages) => {
                        awaited.retain(|p| !pages.contains(p));
                        arrivals.arrive(pages);
                    }
                    Step::GiveUpWaiting(which) if !readers.is_empty() => {
                        readers.swap_remove(which.index(readers.len()));
                    }
                    Step::GiveUpWaiting(_) => {}
                    Step::TakeDemands => {
                        let taken = arrivals.demands().now_or_never().unwrap_or_default();
                        let taken: BTreeSet<u64> = taken.into_iter().flatten().collect();
                        prop_assert_eq!(taken, std::mem::take(&mut demanded));
                    }
                    Step::Fail(errno) => {
                        arrivals.fail(errno);
                        failed.get_or_insert(errno);
                        demanded.clear();
                    }
                }
                for mut reader in std::mem::take(&mut readers) {
                    let (first, now) = (reader.first(&before), reader.first(&awaited));
                    let woken = reader.woken.0.load(Ordering::Relaxed);
                    prop_assert_eq!(woken, first != now || failed.is_some());
                    match (now, failed) {
                        (None, _) => prop_assert_eq!(reader.poll(), Poll::Ready(Ok(()))),
                        (_, Some(errno)) => prop_assert_eq!(reader.poll(), Poll::Ready(Err(errno))),
                        _ => {
                            prop_assert_eq!(reader.poll(), Poll::Pending);
                            readers.push(reader);
                        }
                    }
                }
                let left: BTreeSet<u64> = arrivals.awaited().iter().collect();
                prop_assert_eq!(&left, &awaited);
                let arrived = (start.len() - awaited.len()) as u64;
                prop_assert_eq!(*arrivals.news().borrow(), News { arrived, over: failed.is_some() });
                prop_assert_eq!(arrivals.complete().now_or_never().is_some(), awaited.is_empty());
            }
        }
    }

    #[tokio::test]
    async fn a_demand_and_a_cancellation_reach_a_fetch_that_waits_for_them() {
        let mut awaited = PageBitmap::new(9);
        awaited.insert_range(2..7);
        let arrivals = Arc::new(Arrivals::new(awaited));
        let fetch = tokio::spawn({
            let arrivals = Arc::clone(&arrivals);
            async move {
                let demands = arrivals.demands().await;
                arrivals.arrive(4..7);
                arrivals.cancelled().await;
                arrivals.fail(libc::EIO);
                demands
            }
        });
        assert_eq!(arrivals.wait(&[0..2, 4..6]).await, Ok(()));
        arrivals.cancel();
        assert_eq!(arrivals.wait(&[0..2, 3..5]).await, Err(libc::EIO));
        assert_eq!(fetch.await.unwrap(), [0..2, 4..6]);
    }
}
