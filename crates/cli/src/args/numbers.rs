//! Numbers on the command line.

use std::fmt;
use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::str::FromStr;

/// A number that is neither infinite nor NaN.
pub fn finite(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| "expected a finite number".to_owned())
}

/// A finite number of at least 0.
pub fn not_negative(text: &str) -> Result<f64, String> {
    finite(text).ok().filter(|number| *number >= 0.0).ok_or_else(|| "expected a number of at least 0".to_owned())
}

/// A number of at least 1.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| "expected a number of at least 1".to_owned())
}

/// A number of threads, at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadCount(pub usize);

/// Above any machine's cores: so many threads would only wait for each other.
const MOST_THREADS: usize = 1024;

impl FromStr for ThreadCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(0) => {
                Err("no threads would compute nothing: pass 1 or more, or leave it out for one per core".to_owned())
            }
            Ok(count) if count > MOST_THREADS => Err(format!(
                "expected at most {MOST_THREADS}, usually the number of cores; leave it out for one per core"
            )),
            Ok(count) => Ok(Self(count)),
            Err(_) => Err("expected a whole number of threads, 1 or more".to_owned()),
        }
    }
}

/// The seed of noise: a number, or `random`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SeedArg {
    /// The number.
    pub number: u64,
    /// Whether it was drawn.
    pub is_drawn: bool,
}

impl FromStr for SeedArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            // In the range that every program takes.
            "random" => Ok(Self { number: RandomState::new().build_hasher().finish() >> 32, is_drawn: true }),
            number => {
                let expected = || "expected a whole number, 0 or more, or random to draw one".to_owned();
                let number = number.parse().map_err(|_| expected())?;
                Ok(Self { number, is_drawn: false })
            }
        }
    }
}

impl fmt::Display for SeedArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_number_or_drawn() {
        assert_eq!("7".parse(), Ok(SeedArg { number: 7, is_drawn: false }));
        let drawn: Vec<SeedArg> = (0..3).map(|_| "random".parse().unwrap()).collect();
        assert!(drawn.iter().all(|seed| seed.is_drawn && seed.number <= u64::from(u32::MAX)));
        assert!(drawn[0] != drawn[1] || drawn[1] != drawn[2]);
        assert!("-1".parse::<SeedArg>().unwrap_err().contains("random to draw one"));
    }

    #[test]
    fn no_threads_are_refused() {
        assert_eq!("2".parse(), Ok(ThreadCount(2)));
        assert!("9999".parse::<ThreadCount>().unwrap_err().contains("at most 1024"));
        assert!("0".parse::<ThreadCount>().unwrap_err().contains("leave it out for one per core"));
        assert!("-1".parse::<ThreadCount>().is_err() && "x".parse::<ThreadCount>().is_err());
    }
}
