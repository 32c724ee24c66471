//! Which device is simulated: one of compute capability 8.0, or what `SIMULATOR_CAPABILITY` says.

use crate::report;
use std::ffi::CStr;
use std::sync::OnceLock;

/// What devices differ in.
pub struct Device {
    /// Compute capability, 80 or 90.
    pub capability: u32,
    /// As the driver names it.
    pub name: &'static CStr,
    /// Most shared memory of a block.
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
        let Ok(asked) = std::env::var("SIMULATOR_CAPABILITY") else { return &DEVICES[0] };
        DEVICES.iter().find(|one| one.capability.to_string() == asked).unwrap_or_else(|| {
            report::problem(&format!("no device of capability {asked} is simulated; this is one of 80"));
            &DEVICES[0]
        })
    })
}

/// Chooses it, whatever the environment says; whether it is that one now.
pub fn choose(capability: u32) -> bool {
    DEVICES.iter().find(|one| one.capability == capability).is_some_and(|one| {
        let chosen = CHOSEN.get_or_init(|| one);
        chosen.capability == capability
    })
}

impl Device {
    /// Whether code for `sm_80` or `sm_90a` runs on it: none that is newer, and with a letter none of another capability.
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
