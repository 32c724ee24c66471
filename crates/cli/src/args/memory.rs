//! The arguments of memory.

use super::headings::DEVICE;
use clap::Args;
use clearform::OffloadMode;
use std::str::FromStr;

/// How much memory may be taken.
#[derive(Debug, Clone, Args)]
pub struct MemoryArgs {
    /// Memory to take at most, as 8G or 512M; auto is what the system leaves.
    #[arg(long, default_value = "auto", value_name = "BYTES|auto", help_heading = DEVICE)]
    pub max_memory: MemoryLimit,
    /// Read the blocks of transformer and T5 from the file when it is their turn: auto (where they do not fit into
    /// memory), always or never.
    #[arg(long, default_value_t, value_name = "auto|always|never", help_heading = DEVICE)]
    pub offload: OffloadMode,
}

/// A number of bytes, or none for what the system leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryLimit(pub Option<u64>);

impl FromStr for MemoryLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self(None));
        }
        let units = [("G", 1u64 << 30), ("M", 1 << 20), ("K", 1 << 10)];
        let number = text.trim_end_matches("iB").trim_end_matches('B').to_ascii_uppercase();
        let found = units.iter().find_map(|(unit, bytes)| {
            let number: f64 = number.strip_suffix(unit)?.parse().ok()?;
            (number > 0.0 && number < 1e9).then_some((number * *bytes as f64) as u64)
        });
        found
            .map(|bytes| Self(Some(bytes)))
            .ok_or_else(|| "expected a size with its unit, as 8G or 512M, or auto".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let parsed = |text: &str| text.parse::<MemoryLimit>().map(|limit| limit.0);
        assert_eq!(parsed("auto"), Ok(None));
        assert_eq!(parsed("8G"), Ok(Some(8 << 30)));
        assert_eq!(parsed("1.5GiB"), Ok(Some(3 << 29)));
        assert_eq!(parsed("512m"), Ok(Some(512 << 20)));
        for wrong in ["8", "-1G", "0M", "G", "eight"] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
    }
}
