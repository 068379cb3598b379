//! Decoders: frames become verified pages, on blocking threads, a few at a time.
//!
//! ```text
//! stream --slot--> frame in memory --decode--> a thread per core --> sink
//! ```
//!
//! A frame waits for one of a few slots before it is read off the stream, so memory is bounded by the slots, and a slow
//! disk slows the sender down.

use std::cell::RefCell;
use std::sync::Arc;
use std::thread;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::frame::Decoder;
use super::{FetchError, joined};

thread_local! {
    static DECODER: RefCell<Option<Decoder>> = const { RefCell::new(None) };
}

/// How many frames of a fetch are decoded at once, and how many wait for that.
#[derive(Clone, Debug)]
pub struct Decoders {
    slots: Arc<Semaphore>,
    at_once: Arc<Semaphore>,
}

/// The right to hold one frame.
pub struct Slot {
    // The semaphores are never closed.
    _slot: Option<OwnedSemaphorePermit>,
    at_once: Arc<Semaphore>,
}

impl Decoders {
    /// On every core.
    pub fn everywhere() -> Self {
        let cores = cores();
        Self::new(cores, 2 * cores)
    }

    /// On every core but one, which is left to the container that waits for the pages: where there are two, decoding on
    /// both costs it more time than the pages come sooner.
    pub fn beside_container() -> Self {
        let cores = cores();
        Self::new(1.max(cores - 1), 2 * cores)
    }

    /// This many `at_once`, of at most `held` in memory.
    pub(super) fn new(at_once: usize, held: usize) -> Self {
        Self { slots: Arc::new(Semaphore::new(held)), at_once: Arc::new(Semaphore::new(at_once)) }
    }

    /// Waits until one more frame may be held.
    pub async fn slot(&self) -> Slot {
        Slot { _slot: self.slots.clone().acquire_owned().await.ok(), at_once: Arc::clone(&self.at_once) }
    }

    /// Slots that nobody has.
    #[cfg(test)]
    pub fn free(&self) -> usize {
        self.slots.available_permits()
    }
}

impl Slot {
    /// Gives a decoder to `work`, on a blocking thread, when it is its turn.
    pub async fn decode(
        self,
        work: impl FnOnce(&mut Decoder) -> Result<(), FetchError> + Send + 'static,
    ) -> Result<(), FetchError> {
        let turn = Arc::clone(&self.at_once).acquire_owned().await.ok();
        let decoding = tokio::task::spawn_blocking(move || {
            let (_slot, _turn) = (self, turn);
            DECODER.with_borrow_mut(|decoder| match decoder {
                Some(decoder) => work(decoder),
                None => work(decoder.insert(Decoder::new().map_err(FetchError::Decoder)?)),
            })
        });
        joined(decoding).await
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::Duration;

    use futures_util::poll;
    use tokio::task::JoinSet;

    use super::*;

    #[tokio::test]
    async fn frames_are_held_up_to_the_slots_and_decoded_a_few_at_a_time() {
        let decoders = Decoders::new(2, 5);
        let (open, running, most) = <(Arc<AtomicBool>, Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let mut jobs = JoinSet::new();
        for _ in 0..5 {
            let (open, running, most) = (Arc::clone(&open), Arc::clone(&running), Arc::clone(&most));
            jobs.spawn(decoders.slot().await.decode(move |_| {
                most.fetch_max(1 + running.fetch_add(1, Ordering::SeqCst), Ordering::SeqCst);
                while !open.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
                running.fetch_sub(1, Ordering::SeqCst);
                Ok(())
            }));
        }
        while running.load(Ordering::SeqCst) < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(decoders.free(), 0);
        assert!(poll!(pin!(decoders.slot())).is_pending());
        open.store(true, Ordering::SeqCst);
        while let Some(job) = jobs.join_next().await {
            job.unwrap().unwrap();
        }
        assert_eq!((decoders.free(), most.load(Ordering::SeqCst)), (5, 2));
    }

    #[tokio::test]
    async fn a_fetch_that_is_dropped_decodes_nothing_more() {
        let decoders = Decoders::new(1, 2);
        let (open, ran) = <(Arc<AtomicBool>, Arc<AtomicUsize>)>::default();
        let mut jobs = JoinSet::new();
        for _ in 0..2 {
            let (open, ran) = (Arc::clone(&open), Arc::clone(&ran));
            jobs.spawn(decoders.slot().await.decode(move |_| {
                ran.fetch_add(1, Ordering::SeqCst);
                while !open.load(Ordering::SeqCst) {
                    thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            }));
        }
        while ran.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(jobs);
        open.store(true, Ordering::SeqCst);
        let _all = (decoders.slot().await, decoders.slot().await);
        assert_eq!(ran.load(Ordering::SeqCst), 1);
    }
}
