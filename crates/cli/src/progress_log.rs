//! [`ProgressLog`]: progress as lines, for output that goes to a file.

use std::time::{Duration, Instant};

/// Time between lines.
const EVERY: Duration = Duration::from_secs(30);

/// A line of each stage every 30 seconds.
#[derive(Default)]
pub struct ProgressLog {
    /// The stage, and when a line of it was last due.
    said: Option<(String, Instant)>,
}

impl ProgressLog {
    /// The line that is due at `now`, if one is.
    pub fn line(&mut self, label: &str, text: &str, now: Instant) -> Option<String> {
        let said = match &mut self.said {
            Some((stage, said)) if stage == label => said,
            _ => &mut self.said.insert((label.to_owned(), now)).1,
        };
        if now - *said < EVERY {
            return None;
        }
        *said = now;
        Some(format!("{label}: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_due_every_thirty_seconds() {
        let mut log = ProgressLog::default();
        let begun = Instant::now();
        let mut at = |label: &str, seconds: u64| log.line(label, "1/4", begun + Duration::from_secs(seconds));
        assert_eq!(at("samples", 0), None);
        assert_eq!(at("samples", 29), None);
        assert_eq!(at("samples", 30).as_deref(), Some("samples: 1/4"));
        assert_eq!(at("samples", 59), None);
        assert_eq!(at("samples", 61).as_deref(), Some("samples: 1/4"));
        // A new stage begins anew.
        assert_eq!(at("distilling", 100), None);
        assert_eq!(at("distilling", 130).as_deref(), Some("distilling: 1/4"));
    }
}
