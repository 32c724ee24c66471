//! Devices and dtypes on the command line.

use super::headings::DEVICE;
use clap::{Args, ValueEnum};
use std::str::FromStr;

/// Data types a model can run or be stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit float.
    F16,
}

/// A device, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceArg {
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU with this index.
    Cuda(usize),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let cuda = || text.strip_prefix("cuda:")?.parse().ok().map(Self::Cuda);
        let device = if text == "cpu" { Some(Self::Cpu) } else { cuda() };
        device.ok_or_else(|| "expected cpu or cuda:N".to_owned())
    }
}

/// The device that a model runs on.
#[derive(Debug, Clone, Copy, Args)]
pub struct DeviceArgs {
    /// Device: `cpu`, or `cuda:N` in a build with the feature `cuda`.
    #[arg(long, default_value = "cpu", value_name = "DEVICE", help_heading = DEVICE)]
    pub device: DeviceArg,
}
