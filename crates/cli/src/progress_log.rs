//! [`ProgressLog`]: progress as lines, for output that goes to a file.

use clearform::Progress;
use std::time::{Duration, Instant};

/// Time between lines.
const EVERY: Duration = Duration::from_secs(30);

/// A line of each stage every 30 seconds, with the time that is left.
#[derive(Default)]
pub struct ProgressLog {
    stage: Option<LoggedStage>,
}

struct LoggedStage {
    label: &'static str,
    begun: Instant,
    /// What was done when it began: a resumed run goes on in the middle.
    first: f64,
    said: Instant,
}

impl ProgressLog {
    /// The line that is due at `now`, if one is.
    pub fn line(&mut self, label: &'static str, progress: &Progress, text: &str, now: Instant) -> Option<String> {
        let stage = match &mut self.stage {
            Some(stage) if stage.label == label => stage,
            _ => {
                let first = progress.fraction;
                self.stage.insert(LoggedStage { label, begun: now, first, said: now })
            }
        };
        if now - stage.said < EVERY {
            return None;
        }
        stage.said = now;
        let done = progress.fraction - stage.first;
        let left = (done > 0.0).then(|| (now - stage.begun).mul_f64((1.0 - progress.fraction) / done));
        let left = left.map(|left| format!(", {} left", minutes(left))).unwrap_or_default();
        Some(format!("{label}: {text}{left}"))
    }
}

/// A time of a log: hours and minutes, or seconds if it is short.
fn minutes(time: Duration) -> String {
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
    fn a_line_is_due_every_thirty_seconds() {
        let mut log = ProgressLog::default();
        let begun = Instant::now();
        let mut at = |seconds: u64, step: usize| {
            let fraction = step as f64 / 1000.0;
            let progress = Progress { done: step, total: 1000, fraction, ..Progress::of_stage(Stage::Distilling) };
            log.line("distilling", &progress, &format!("{step}/1000"), begun + Duration::from_secs(seconds))
        };
        assert_eq!(at(0, 500), None);
        assert_eq!(at(29, 510), None);
        assert_eq!(at(30, 600).as_deref(), Some("distilling: 600/1000, 2 min left"));
        assert_eq!(at(59, 610), None);
        assert_eq!(at(60, 900).as_deref(), Some("distilling: 900/1000, 15 s left"));
    }

    #[test]
    fn a_new_stage_begins_anew() {
        let mut log = ProgressLog::default();
        let begun = Instant::now();
        let later = begun + Duration::from_secs(40);
        let progress = Progress::of_stage(Stage::Samples);
        assert_eq!(log.line("samples", &progress, "0/4", begun), None);
        assert_eq!(log.line("distilling", &progress, "0/4", later), None);
        assert_eq!(log.line("distilling", &progress, "0/4", later + EVERY).as_deref(), Some("distilling: 0/4"));
    }
}
