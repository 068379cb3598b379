//! How slow a peer may be.
//!
//! A peer that keeps us waiting must bring, or take, 64 KiB for each patience's length of waiting, all
//! waits taken together. So one that stands still is given up after a patience, and so is one that moves a byte now and
//! then; one that is slow and honest is not. Time in which nobody waits for the peer does not count.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use tokio::time::{Instant, timeout};

/// Less than this is no progress.
const PROGRESS: u64 = 64 << 10;

/// The waits for a peer in one direction.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    patience: Duration,
    /// Waited since the last progress.
    spent: Duration,
    /// Moved since then.
    bytes: u64,
}

impl Pace {
    /// A peer for which nobody has waited yet.
    pub fn new(patience: Duration) -> Self {
        Self { patience, spent: Duration::ZERO, bytes: 0 }
    }

    /// What a peer may spend without progress.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// What the peer brings next, of which `bytes` tells the length; `None` if it takes too long.
    pub async fn wait<T>(
        &mut self,
        next: impl Future<Output = T>,
        bytes: impl FnOnce(&T) -> usize,
    ) -> Option<T> {
        let begin = Instant::now();
        let brought = timeout(self.left(), next).await.ok()?;
        self.moved(begin.elapsed(), bytes(&brought) as u64);
        Some(brought)
    }

    /// The next piece of `stream`, as a peer brings it; `None` if it takes too long.
    pub async fn next<E>(
        &mut self,
        stream: &mut (impl Stream<Item = Result<Bytes, E>> + Unpin),
    ) -> Option<Option<Result<Bytes, E>>> {
        self.wait(stream.next(), |piece| match piece {
            Some(Ok(bytes)) => bytes.len(),
            Some(Err(_)) | None => 0,
        })
        .await
    }

    /// How long the next wait may take.
    pub fn left(&self) -> Duration {
        self.patience.saturating_sub(self.spent)
    }

    /// After a wait of this length so many bytes moved.
    pub fn moved(&mut self, waited: Duration, bytes: u64) {
        self.spent += waited;
        self.bytes += bytes;
        if self.bytes >= PROGRESS {
            (self.spent, self.bytes) = (Duration::ZERO, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_without_progress_add_up() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(5 * second);
        for left in (1..=4).rev() {
            pace.moved(second, 1);
            assert_eq!(pace.left(), left * second);
        }
        pace.moved(second / 2, PROGRESS - 4);
        assert_eq!(pace.left(), 5 * second);
        pace.moved(6 * second, PROGRESS - 1);
        assert_eq!(pace.left(), Duration::ZERO);
        pace.moved(Duration::ZERO, 1);
        assert_eq!(pace.left(), pace.patience());
    }
}
