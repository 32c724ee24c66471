//! [`Components::problems`]: what a pipeline could not run with, found before any weight is read.

use crate::components::VAE;
use crate::text::check_encoder;
use crate::{Components, Result, RuntimeError};
use clearform_layout::{Identified, LayoutError, LoadReport};
use clearform_models::ModelError;
use clearform_models::vae::autoencoder;

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

impl Components {
    /// Checks every component of a model `identified` that exists: its config, its tokenizer and the headers of its weights.
    ///
    /// # Errors
    /// The first of [`Self::problems`].
    pub fn check(&self, identified: &Identified) -> Result<()> {
        self.problems(identified).into_iter().next().map_or(Ok(()), |(_, problem)| Err(problem))
    }

    /// The components of a model `identified` that exist, but cannot be used, with the reasons.
    pub fn problems(&self, identified: &Identified) -> Vec<(String, RuntimeError)> {
        let existing = identified.all_components().filter(|name| self.has(name));
        existing.filter_map(|name| Some((name.clone(), self.check_component(identified, name).err()?))).collect()
    }

    fn check_component(&self, identified: &Identified, name: &str) -> Result<()> {
        if name == "scheduler" {
            return self.scheduler(identified).map(drop);
        }
        self.check_weights([&name.to_owned()])?;
        self.check_tensors(identified, name)?;
        match name {
            VAE => autoencoder(&self.config(VAE)?).map(drop).map_err(|error| self.located(VAE, error)),
            encoder if encoder.starts_with("text_encoder") => check_encoder(self, encoder),
            _ => Ok(()),
        }
    }

    /// Checks the tensors of every component of a model `identified` that is in a folder, and notes those that are not used.
    ///
    /// # Errors
    /// A tensor is missing, or has not the shape that it has in the component's class.
    pub fn with_checked_tensors(mut self, identified: &Identified) -> Result<Self> {
        for name in identified.all_components() {
            let unused = self.check_tensors(identified, name)?;
            self.notes.extend(unused.into_iter().chain(self.tokenizer_note(name)));
        }
        Ok(self)
    }

    /// What is to be said of tensors of component `name` that its class does not have.
    fn check_tensors(&self, identified: &Identified, name: &str) -> Result<Option<String>> {
        let Some((folder, weights)) = self.in_folder(name)? else { return Ok(None) };
        let config = self.config(name)?;
        // What the rules do not know is left to the component's class, as are the settings of config.json.
        let Ok(Some(component)) = identified.component_named(name, weights.source().as_ref()) else { return Ok(None) };
        let Ok(opened) = component.open(weights.source().clone(), Some(&config)) else { return Ok(None) };
        let report = opened.tensors.load_report();
        let lacking = LoadReport {
            missing: report.missing.clone(),
            misshapen: report.misshapen.clone(),
            suggestions: report.suggestions.clone(),
            ..LoadReport::default()
        };
        if !lacking.is_sufficient() {
            let reason = LayoutError::Incomplete(Box::new(lacking)).to_string();
            return Err(RuntimeError::BadComponent { path: folder, reason });
        }
        let unknown: Vec<&str> = report.unmatched().map(|(name, _)| name).collect();
        Ok(unknown.first().map(|first| {
            let (folder, count) = (folder.display(), unknown.len());
            format!("{folder}: tensors that its class does not have are not used: {first:?}, {count} in all")
        }))
    }

    /// What is to be said of tokenizer `name` if it does not state the longest prompt.
    pub(crate) fn tokenizer_note(&self, name: &str) -> Option<String> {
        let folder = self.folder(name).ok().filter(|_| name.starts_with("tokenizer"))?;
        let is_there = folder.join(TOKENIZER_CONFIG).exists();
        (!is_there).then(|| {
            format!("{} has no {TOKENIZER_CONFIG}: prompts are as long as the family's may be", folder.display())
        })
    }

    /// The error of building component `name`, with its place.
    pub(crate) fn located(&self, name: &str, error: ModelError) -> RuntimeError {
        const REMEDY: &str = "copy the file again from where the model came from";
        let tokenizer = || self.folder(&name.replace("text_encoder", "tokenizer")).ok();
        let (place, reason) = match &error {
            // It has a place already, or is not about a file.
            ModelError::Encoder(_) | ModelError::BadInput { .. } => return error.into(),
            ModelError::Tokenizer(reason) => (tokenizer(), format!("{reason}; {REMEDY}")),
            other => (self.place(name), other.to_string()),
        };
        match place {
            Some(path) => RuntimeError::BadComponent { path, reason },
            None => error.into(),
        }
    }
}
