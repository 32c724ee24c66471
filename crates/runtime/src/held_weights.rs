//! [`HeldWeights`]: what a loaded pipeline keeps in memory.

use crate::Result;
use clearform_models::Denoiser;
use clearform_models::text::TextEncoder;
use clearform_models::vae::Autoencoder;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Components that were loaded, by first use.
#[derive(Default)]
pub(crate) struct HeldWeights {
    pub encoders: Held<BTreeMap<&'static str, Arc<dyn TextEncoder>>>,
    pub transformer: Held<Option<Arc<dyn Denoiser>>>,
    pub autoencoder: Held<Option<Arc<dyn Autoencoder>>>,
}

/// A value that several threads may fill.
#[derive(Default)]
pub(crate) struct Held<T>(Mutex<T>);

impl<T> Held<T> {
    /// Reads or changes the value. Loading happens under the lock, so that nothing is loaded twice.
    pub fn with<R>(&self, use_value: impl FnOnce(&mut T) -> Result<R>) -> Result<R> {
        use_value(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<T: ?Sized> Held<Option<Arc<T>>> {
    /// The value, loaded at the first call.
    pub fn get_or_load(&self, load: impl FnOnce() -> Result<Arc<T>>) -> Result<Arc<T>> {
        self.with(|held| match held {
            Some(value) => Ok(value.clone()),
            None => Ok(held.insert(load()?).clone()),
        })
    }
}
