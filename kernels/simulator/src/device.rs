//! The simulated device: compute capability 8.0, or 9.0 with `SIMULATOR_CAPABILITY=90`.

use crate::report;
use std::ffi::CStr;
use std::sync::OnceLock;

/// A device.
pub struct Device {
    /// Compute capability, major · 10 + minor.
    pub capability: u32,
    /// The name that the driver reports.
    pub name: &'static CStr,
    /// The most shared memory of a block.
    pub shared_bytes: usize,
}

static DEVICES: [Device; 2] = [
    Device { capability: 80, name: c"simulated sm_80", shared_bytes: 163 << 10 },
    Device { capability: 90, name: c"simulated sm_90", shared_bytes: 227 << 10 },
];

static CHOSEN: OnceLock<&'static Device> = OnceLock::new();

/// The device of this process.
pub fn device() -> &'static Device {
    CHOSEN.get_or_init(|| {
        let Ok(requested) = std::env::var("SIMULATOR_CAPABILITY") else { return &DEVICES[0] };
        DEVICES.iter().find(|device| device.capability.to_string() == requested).unwrap_or_else(|| {
            report::problem(&format!("SIMULATOR_CAPABILITY={requested} is neither 80 nor 90; simulating 80"));
            &DEVICES[0]
        })
    })
}

/// Chooses the device whatever the environment says; false if another one has been chosen before.
pub fn choose(capability: u32) -> bool {
    DEVICES.iter().find(|device| device.capability == capability).is_some_and(|device| {
        let chosen = CHOSEN.get_or_init(|| device);
        chosen.capability == capability
    })
}

impl Device {
    /// Whether code for a target such as `sm_80` or `sm_90a` runs here. Plain targets run on newer devices, those with a
    /// letter only on their own.
    pub fn runs(&self, target: &str) -> bool {
        let named = target.trim_start_matches("sm_");
        let number = named.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
        number.parse().is_ok_and(|number: u32| {
            if named.ends_with(|letter: char| letter.is_ascii_digit()) {
                number <= self.capability
            } else {
                number == self.capability
            }
        })
    }
}
