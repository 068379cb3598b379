//! The fetch of one start: it goes on beside the start and, if that streams, beyond it.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tdfs_common::bitmap::PageBitmap;
use tdfs_common::runtime_image::Service;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::NodeError;
use super::start::ms;
use super::timeline::Moments;
use crate::fetch::{
    Arrivals, Commit, Decoders, FetchError, FetchStats, PageService, Progress, fetch_announced,
};
use crate::oci::Store;
use crate::rtpc::Zone;

/// How often the rate of a fetch is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// Between two looks at the progress: nobody sees more, and waking up takes the container's processor.
const SHOW: Duration = Duration::from_millis(20);
/// What comes in less time says nothing about the rate.
const WATCHED: Duration = Duration::from_millis(40);

/// What becomes of pages that are still on the wire when a container ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// They are fetched: the next start finds everything.
    Fetch,
    /// They are left out: the next start fetches them.
    Leave,
}

/// A fetch under way. Dropping it cancels it and fails its readers.
pub(super) struct Fetching {
    arrivals: Arc<Arrivals>,
    task: Option<JoinHandle<Result<Fetched, FetchError>>>,
    /// Bytes received and bytes to receive.
    bytes: watch::Receiver<(u64, u64)>,
    unwatched: Arc<AtomicBool>,
    begin: Instant,
    fetched: Option<Fetched>,
    recorder: Option<JoinHandle<()>>,
}

struct Fetched {
    stats: FetchStats,
    ms: f64,
    commit: Option<Commit>,
}

impl Fetching {
    /// Starts to bring the pages of `service` that are `missing` into its `zone`.
    pub fn begin(
        store: &Store,
        mut pages: PageService,
        (service, zone): &(Arc<Service>, Arc<Zone>),
        missing: PageBitmap,
        decoders: Decoders,
    ) -> Self {
        let begin = Instant::now();
        let arrivals = Arc::new(Arrivals::new(missing));
        let (tell, bytes) = watch::channel((0, 0));
        let unwatched = Arc::new(AtomicBool::new(false));
        let (store, service, zone) = (store.clone(), Arc::clone(service), Arc::clone(zone));
        let (announced, alone) = (Arc::clone(&arrivals), Arc::clone(&unwatched));
        let task = tokio::spawn(async move {
            let progress = |done, total| {
                tell.send_replace((done, total));
            };
            let fetched =
                fetch_announced(&store, &mut pages, &service, &zone, &announced, &decoders, &progress).await;
            if let Err(error) = &fetched
                && alone.load(Ordering::Relaxed)
            {
                tracing::error!("pages did not arrive, their reads fail: {error}");
            }
            let (stats, commit) = fetched?;
            Ok(Fetched { stats, ms: ms(begin), commit: Some(commit) })
        });
        Self { arrivals, task: Some(task), bytes, unwatched, begin, fetched: None, recorder: None }
    }

    /// Tells of its pages.
    pub fn arrivals(&self) -> &Arc<Arrivals> {
        &self.arrivals
    }

    /// Waits until every page is there.
    pub async fn done(&mut self) -> Result<(), NodeError> {
        if let Some(task) = &mut self.task {
            let fetched = task.await;
            self.task = None;
            self.fetched = Some(fetched??);
        }
        Ok(())
    }

    /// Waits until every page is there (`true`), unless the rest `is_long`: told how long it should take at the rate so
    /// far, and how many pages it has.
    pub async fn done_unless(&mut self, is_long: impl Fn(Duration, u64) -> bool) -> Result<bool, NodeError> {
        let bytes = self.bytes.clone();
        // The first bytes may have waited for anything: the rate is that of those after them.
        let mut first = None;
        loop {
            tokio::select! {
                done = self.done() => return done.map(|()| true),
                () = tokio::time::sleep(LOOK) => {}
            }
            let (received, total) = *bytes.borrow();
            let (since, before) = match first {
                Some(first) => first,
                None if received > 0 => *first.insert((Instant::now(), received)),
                None => continue,
            };
            let (took, got) = (since.elapsed(), received - before);
            if took >= WATCHED && got > 0 {
                let rest = took.mul_f64(total.saturating_sub(received) as f64 / got as f64);
                if is_long(rest, self.arrivals.awaited().count()) {
                    return Ok(false);
                }
            }
        }
    }

    /// Waits until it fails.
    pub async fn failure(&mut self) -> NodeError {
        match self.done().await {
            Err(error) => error,
            Ok(()) => std::future::pending().await,
        }
    }

    /// Shows how far it is, for as long as it is polled.
    pub fn show<'a>(&self, progress: Progress<'a>) -> impl Future<Output = Infallible> + use<'a> {
        let mut bytes = self.bytes.clone();
        async move {
            while bytes.changed().await.is_ok() {
                let (done, total) = *bytes.borrow_and_update();
                progress(done, total);
                tokio::time::sleep(SHOW).await;
            }
            std::future::pending().await
        }
    }

    /// Tells `moments` how far it is, until its end.
    pub fn record(&mut self, moments: Moments) {
        let (mut news, mut bytes) = (self.arrivals.news(), self.bytes.clone());
        self.recorder = Some(tokio::spawn(async move {
            // Its readers may be released before it ends; nobody tells of bytes any more when it has.
            let mut open = true;
            loop {
                let (arrived, (received, total)) =
                    (news.borrow_and_update().arrived, *bytes.borrow_and_update());
                moments.arrived(arrived, received, total);
                if !open {
                    return;
                }
                tokio::select! {
                    changed = news.changed() => open = changed.is_ok(),
                    changed = bytes.changed() => open = changed.is_ok(),
                }
            }
        }));
    }

    /// When it began.
    pub fn since(&self) -> Instant {
        self.begin
    }

    /// What was fetched so far, without requests, and for how long, milliseconds. From now on nobody looks at its outcome
    /// before its end: it tells of a failure itself.
    pub async fn leave_alone(&mut self) -> (FetchStats, f64) {
        self.unwatched.store(true, Ordering::Relaxed);
        if self.task.as_ref().is_some_and(JoinHandle::is_finished)
            && let Err(error) = self.done().await
        {
            tracing::error!("pages did not arrive, their reads fail: {error}");
        }
        if let Some(fetched) = &self.fetched {
            return (fetched.stats, fetched.ms);
        }
        let pages_fetched = self.arrivals.news().borrow().arrived;
        let bytes_fetched = self.bytes.borrow().0;
        (FetchStats { pages_fetched, bytes_fetched, ..FetchStats::default() }, ms(self.begin))
    }

    /// Fails its readers: a container whose reads wait cannot be killed.
    pub fn release_readers(&self) {
        self.arrivals.fail(libc::EIO);
    }

    /// Ends it. What was fetched is durable afterwards.
    pub async fn end(mut self, rest: Rest) {
        if rest == Rest::Leave {
            self.arrivals.cancel();
        }
        if self.done().await.is_ok() {
            self.commit().await;
        }
        if let Some(recorder) = self.recorder.take() {
            // It ends with the fetch; what it wrote down is then complete.
            let _ = recorder.await;
        }
    }

    /// Ends it because the start failed with `error`, and returns why: readers of pages that will not come get errors
    /// before the fetch tells.
    pub async fn give_up(mut self, error: NodeError) -> NodeError {
        let failed = self.arrivals.news().borrow().over;
        self.release_readers();
        self.arrivals.cancel();
        match self.done().await {
            Err(cause) if failed => cause,
            Err(_) => error,
            Ok(()) => {
                self.commit().await;
                error
            }
        }
    }

    async fn commit(&mut self) {
        let commit = self.fetched.as_mut().and_then(|f| f.commit.take());
        if let Some(commit) = commit
            && let Err(error) = commit.wait().await
        {
            tracing::warn!("the fetched pages are not durable: {error}");
        }
    }
}

impl Drop for Fetching {
    fn drop(&mut self) {
        self.release_readers();
        self.arrivals.cancel();
    }
}
