//! [`StageClock`]: how long a stage will still take.

use clearform::Progress;
use std::time::{Duration, Instant};

/// The time of the stage under way.
#[derive(Default)]
pub struct StageClock {
    begin: Option<StageBegin>,
}

struct StageBegin {
    label: String,
    at: Instant,
    /// What was done when it began: a resumed run goes on in the middle.
    first: f64,
    /// What was done when it was last seen.
    last: f64,
}

impl StageClock {
    /// The time that is left of the stage `label` at `now`, if it goes on as it did since it began; `None` before
    /// something is done.
    pub fn left(&mut self, label: &str, progress: &Progress, now: Instant) -> Option<Duration> {
        let fraction = progress.fraction;
        let begin = match &mut self.begin {
            // Samples to hold out begin where those to train on were done.
            Some(begin) if begin.label == label && begin.last <= fraction => begin,
            _ => {
                let begin = StageBegin { label: label.to_owned(), at: now, first: fraction, last: fraction };
                self.begin.insert(begin)
            }
        };
        begin.last = fraction;
        let done = fraction - begin.first;
        (done > 0.0).then(|| (now - begin.at).mul_f64((1.0 - fraction).max(0.0) / done))
    }
}

/// A time as hours and minutes, or seconds if it is short.
pub fn minutes(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clearform::Stage;

    #[test]
    fn what_is_left_follows_from_what_was_done_since_the_stage_began() {
        let mut clock = StageClock::default();
        let begun = Instant::now();
        let mut left = |label: &str, seconds: u64, fraction: f64| {
            let progress = Progress { fraction, ..Progress::of_stage(Stage::Distilling) };
            clock.left(label, &progress, begun + Duration::from_secs(seconds)).map(minutes)
        };
        assert_eq!(left("distilling", 0, 0.5), None);
        assert_eq!(left("distilling", 30, 0.6).as_deref(), Some("2 min"));
        assert_eq!(left("distilling", 60, 0.9).as_deref(), Some("15 s"));
        assert_eq!(left("writing", 100, 0.0), None);
        assert_eq!(left("writing", 3700, 0.25).as_deref(), Some("3 h 0 min"));
        // The same stage once more.
        assert_eq!(left("writing", 4000, 0.0), None);
        assert_eq!(left("writing", 4010, 0.5).as_deref(), Some("10 s"));
    }
}
