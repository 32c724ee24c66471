//! [`PipelineTextEncoders`]: the text encoders of a pipeline. Each is loaded when a family calls it and released after the
//! call. How their outputs are combined is up to the family.

use crate::damage::check_encoding;
use crate::held_weights::Held;
use crate::pipeline_memory::planned_encoder;
use crate::{Components, MemoryOptions, MemoryPlan, Residency, Result, RuntimeError};
use candle_core::{DType, Device};
use clearform_models::ModelError;
use clearform_models::text::{
    EncodedText, TEXT_ENCODERS, TextEncoder, TextEncoderClass, TextEncoderFiles, TextEncoders, TextRequest,
    TruncatedPrompt,
};
use clearform_plugin_host::{LowRankMode, PatchedSource, WeightEdits};
use clearform_weights::{InMemoryTensors, StreamedSource, TensorSource};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The text encoders of a pipeline, with the edits of adapters.
pub(crate) struct PipelineTextEncoders<'a> {
    pub components: &'a Components,
    pub edits: &'a Arc<WeightEdits>,
    pub device: &'a Device,
    pub memory: MemoryOptions,
    /// Encoders that stay in memory, if the pipeline is loaded.
    pub held: Option<&'a Held<BTreeMap<&'static str, Arc<dyn TextEncoder>>>>,
    /// What was cut off prompts so far: families return conditions alone.
    pub truncated: RefCell<Vec<TruncatedPrompt>>,
}

/// The weights of the VAE with the edits of adapters, ready to be built on `device`. Low-rank edits are merged, since
/// convolutions cannot add a low-rank product.
pub(crate) fn open_weights<'a>(
    components: &Components,
    component: &str,
    edits: &'a WeightEdits,
    device: &Device,
) -> Result<Box<dyn TensorSource + 'a>> {
    let patched = PatchedSource::new(components.weights(component)?, edits, component, LowRankMode::Fused);
    Ok(match device {
        Device::Cpu => Box::new(patched),
        // The VAE computes in f32. Converting on the CPU avoids a second copy in the memory of the GPU.
        _ => Box::new(InMemoryTensors::load(&patched, Some(DType::F32), device)?),
    })
}

impl TextEncoders for PipelineTextEncoders<'_> {
    fn has(&self, component: &str) -> bool {
        self.components.has(component)
    }

    fn encode(&self, prompts: &[String], request: &TextRequest) -> clearform_models::Result<EncodedText> {
        let encoder = match self.held {
            Some(held) => held.with(|encoders| self.get_or_load(encoders, request)),
            None => self.load(request),
        };
        let encoded = encoder.map_err(model_error)?.encode(prompts, request)?;
        check_encoding(&encoded, self.components, request.component).map_err(model_error)?;
        self.truncated.borrow_mut().extend(encoded.truncated.iter().cloned());
        Ok(encoded)
    }
}

impl PipelineTextEncoders<'_> {
    /// Loads the encoder that `request` names.
    fn load(&self, request: &TextRequest) -> Result<Arc<dyn TextEncoder>> {
        let TextEncoderClass { load, streams, .. } = self.class(request)?;
        let component = request.component;
        let residency = if *streams { self.residency(component)? } else { Residency::InMemory };
        let loaded = load(&EncoderComponent { encoders: self, component, residency });
        Ok(loaded.map_err(|error| self.components.located(component, error))?.into())
    }

    /// Where the blocks of the encoder `component` are while it runs.
    fn residency(&self, component: &str) -> Result<Residency> {
        if !self.device.is_cpu() {
            return Ok(Residency::InMemory);
        }
        let planned = planned_encoder(self.components, component, self.held.is_some())?;
        Ok(MemoryPlan::fit(vec![planned], self.memory)?.residency(component))
    }

    fn get_or_load(
        &self,
        encoders: &mut BTreeMap<&'static str, Arc<dyn TextEncoder>>,
        request: &TextRequest,
    ) -> Result<Arc<dyn TextEncoder>> {
        match encoders.get(request.component) {
            Some(encoder) => Ok(encoder.clone()),
            None => {
                let encoder = self.load(request)?;
                encoders.insert(request.component, encoder.clone());
                Ok(encoder)
            }
        }
    }

    /// The class that `request` asks for, unless the component's config.json states another.
    fn class(&self, request: &TextRequest) -> Result<&'static TextEncoderClass> {
        let TextRequest { component, class, .. } = *request;
        let found = self.components.config(component)?["architectures"][0].as_str().map(str::to_owned);
        let expected = TEXT_ENCODERS.iter().find(|known| known.names.contains(&class));
        let fits = |known: &&TextEncoderClass| found.as_deref().is_none_or(|found| known.names.contains(&found));
        expected.filter(fits).ok_or_else(|| RuntimeError::BadComponent {
            path: self.components.folder(component).unwrap_or_else(|_| component.into()),
            reason: format!(
                "expected a {class}, found {}; pass the folder of this family's encoder with --components",
                found.as_deref().unwrap_or("none")
            ),
        })
    }
}

/// Checks config and tokenizer of the text encoder `component`, if its config.json states a class that is known.
///
/// # Errors
/// A file is missing or damaged.
pub(crate) fn check_encoder(components: &Components, component: &str) -> Result<()> {
    let stated = components.config(component)?["architectures"][0].as_str().map(str::to_owned);
    let class = TEXT_ENCODERS.iter().find(|class| class.names.iter().any(|name| Some(*name) == stated.as_deref()));
    let Some(class) = class else { return Ok(()) };
    let encoders = PipelineTextEncoders {
        components,
        edits: &Arc::default(),
        device: &Device::Cpu,
        memory: MemoryOptions::default(),
        held: None,
        truncated: RefCell::default(),
    };
    let files = EncoderComponent { encoders: &encoders, component, residency: Residency::InMemory };
    (class.check)(&files).map_err(|error| components.located(component, error))
}

/// The files of one text encoder.
struct EncoderComponent<'a> {
    encoders: &'a PipelineTextEncoders<'a>,
    component: &'a str,
    residency: Residency,
}

impl EncoderComponent<'_> {
    /// `tokenizer_2` belongs to `text_encoder_2`.
    fn tokenizer(&self) -> String {
        self.component.replace("text_encoder", "tokenizer")
    }

    fn required(&self, name: &str) -> Result<Vec<u8>> {
        let components = self.encoders.components;
        if let Some(bytes) = components.bytes(&self.tokenizer(), name)? {
            return Ok(bytes);
        }
        let reason = format!("{name} is missing. Save the tokenizer with transformers 4.30 or newer, or copy the file");
        Err(RuntimeError::BadComponent { path: components.folder(&self.tokenizer())?, reason })
    }

    /// Weights in their stored dtype, which encoders convert where they use them, with low-rank edits beside them.
    fn open_weights(&self) -> Result<Box<dyn TensorSource>> {
        let PipelineTextEncoders { components, edits, device, .. } = *self.encoders;
        let mut stored = components.weights(self.component)?;
        if !device.is_cpu() {
            stored = Box::new(InMemoryTensors::load(&stored, None, device)?);
        }
        let patched = PatchedSource::new(stored, edits.clone(), self.component, LowRankMode::Separate);
        Ok(match self.residency {
            Residency::InMemory => Box::new(patched),
            Residency::Streamed => Box::new(StreamedSource(Arc::new(patched))),
        })
    }
}

impl TextEncoderFiles for EncoderComponent<'_> {
    fn config(&self) -> clearform_models::Result<Value> {
        self.encoders.components.config(self.component).map_err(model_error)
    }

    fn weights(&self) -> clearform_models::Result<Box<dyn TensorSource + '_>> {
        self.open_weights().map_err(model_error)
    }

    fn tokenizer_file(&self, name: &str) -> clearform_models::Result<Option<Vec<u8>>> {
        self.encoders.components.bytes(&self.tokenizer(), name).map_err(model_error)
    }

    fn required_tokenizer_file(&self, name: &str) -> clearform_models::Result<Vec<u8>> {
        self.required(name).map_err(model_error)
    }

    fn device(&self) -> &Device {
        self.encoders.device
    }
}

/// The error as families return it.
fn model_error(error: RuntimeError) -> ModelError {
    match error {
        RuntimeError::Model(error) => error,
        other => ModelError::Encoder(Box::new(other)),
    }
}
