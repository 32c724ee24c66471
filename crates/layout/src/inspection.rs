//! [`Inspection`]: all that is known of a checkpoint, to be printed as text or as JSON.

use crate::account::{Account, Contradiction, Misshapen, Missing};
use crate::assembly::Canonical;
use crate::detect::Identified;
use crate::estimate::Estimate;
use crate::family::Variant;
use clearform_weights::{TensorInfo, TensorSource};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;

/// Faults that are printed; JSON has all.
const MOST_LINES: usize = 100;

/// An input tensor that was not used, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unused {
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// What a checkpoint holds.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// Whether all of it is there and understood.
    pub complete: bool,
    /// Name of the family.
    pub family: String,
    /// The variant and its defaults.
    pub variant: Variant,
    /// Name of the layout.
    pub layout: String,
    /// What stands before every name.
    pub prefix: String,
    /// Numbers of blocks.
    pub depth: BTreeMap<String, usize>,
    /// Numbers in all canonical tensors.
    pub parameters: u64,
    /// Bytes of all canonical tensors.
    pub bytes: u64,
    /// How many canonical tensors have which number format.
    pub dtypes: BTreeMap<String, usize>,
    /// Parts of its pipeline that lie in the same file.
    pub parts: Vec<String>,
    /// How many input tensors are used.
    pub used: usize,
    /// The diffusers config.json.
    pub config: Value,
    /// By what it was found.
    pub evidence: Vec<String>,
    /// What was taken for granted.
    pub notes: Vec<String>,
    /// Where config.json and the tensors differ.
    pub contradictions: Vec<Contradiction>,
    /// Tensors that are not there.
    pub missing: Vec<Missing>,
    /// Tensors of a wrong shape.
    pub misshapen: Vec<Misshapen>,
    /// Tensors that nobody knows.
    pub unmatched: Vec<Unused>,
    /// Tensors that are not the model's.
    pub skipped: Vec<Unused>,
    /// Cost of pictures; estimates.
    pub estimates: Vec<Estimate>,
}

impl Inspection {
    /// Gathers what is known; reads no tensor.
    pub fn new<S: TensorSource>(identified: &Identified, canonical: &Canonical<S>) -> Self {
        let account = canonical.account();
        let tensors = canonical.tensors();
        let bytes = tensors.iter().map(byte_count).sum();
        Self {
            complete: account.complete(),
            family: identified.family.clone(),
            variant: identified.variant.clone(),
            layout: identified.layout.clone(),
            prefix: identified.prefix.clone(),
            depth: identified.depths(),
            parameters: tensors.iter().map(elements).sum(),
            bytes,
            dtypes: histogram(&tensors),
            parts: identified.parts_in(canonical.source()).into_iter().map(|part| part.name).collect(),
            used: account.used(),
            config: identified.config.clone(),
            evidence: identified.evidence.clone(),
            notes: identified.notes.clone(),
            contradictions: account.contradictions.clone(),
            missing: account.missing.clone(),
            misshapen: account.misshapen.clone(),
            unmatched: unused(account.unmatched()),
            skipped: unused(account.skipped()),
            estimates: Estimate::of(identified, bytes),
        }
    }

    /// Whether the model is whole and every tensor is understood.
    pub fn complete(&self) -> bool {
        self.complete
    }

    /// What is wrong, a line each.
    pub fn complaints(&self) -> Vec<String> {
        let unmatched = self.unmatched.iter().map(|one| (one.name.clone(), one.reason.clone()));
        let fate = |(name, reason)| (name, crate::account::Fate::Unmatched { reason });
        let (missing, misshapen) = (self.missing.clone(), self.misshapen.clone());
        let contradictions = self.contradictions.clone();
        Account { fates: unmatched.map(fate).collect(), missing, misshapen, contradictions }.complaints()
    }

    fn skipped_by_reason(&self) -> BTreeMap<&str, usize> {
        self.skipped.iter().fold(BTreeMap::new(), |mut counts, one| {
            *counts.entry(one.reason.as_str()).or_default() += 1;
            counts
        })
    }
}

impl fmt::Display for Inspection {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Variant { name, defaults } = &self.variant;
        let pairs = |pairs: &BTreeMap<String, usize>| {
            pairs.iter().map(|(key, count)| format!("{key} {count}")).collect::<Vec<_>>().join(", ")
        };
        let (steps, guidance) = (defaults.steps, defaults.guidance);
        writeln!(f, "family      {} (variant {name}: {steps} steps, guidance {guidance})", self.family)?;
        writeln!(f, "layout      {} (prefix {:?})", self.layout, self.prefix)?;
        writeln!(f, "depth       {}", pairs(&self.depth))?;
        writeln!(f, "parameters  {} in {} ({})", self.parameters, size(self.bytes), pairs(&self.dtypes))?;
        writeln!(f, "tensors     {} used, {} skipped", self.used, self.skipped.len())?;
        if !self.parts.is_empty() {
            writeln!(f, "parts       {}", self.parts.join(", "))?;
        }
        for (reason, count) in self.skipped_by_reason() {
            writeln!(f, "  skipped   {count}: {reason}")?;
        }
        self.evidence.iter().try_for_each(|line| writeln!(f, "evidence    {line}"))?;
        self.notes.iter().try_for_each(|line| writeln!(f, "note        {line}"))?;
        let complaints = self.complaints();
        complaints.iter().take(MOST_LINES).try_for_each(|line| writeln!(f, "WRONG       {line}"))?;
        if let more @ 1.. = complaints.len().saturating_sub(MOST_LINES) {
            writeln!(f, "WRONG       and {more} more")?;
        }
        self.estimates.iter().try_for_each(|estimate| writeln!(f, "estimate    {estimate}"))?;
        write!(f, "{}", if self.complete { "complete" } else { "NOT complete" })
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { side, tokens, full_teraflop: full, clear_teraflop: clear, .. } = self;
        let memory = size(self.memory_bytes);
        write!(f, "{side} px ({tokens} tokens): about {memory}; ")?;
        write!(f, "per step {full:.3} Tflop with full attention, {clear:.3} with CLEAR of radius 16")
    }
}

fn unused<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<Unused> {
    pairs.map(|(name, reason)| Unused { name: name.to_owned(), reason: reason.to_owned() }).collect()
}

fn histogram(tensors: &[TensorInfo]) -> BTreeMap<String, usize> {
    tensors.iter().fold(BTreeMap::new(), |mut counts, info| {
        *counts.entry(format!("{:?}", info.dtype)).or_default() += 1;
        counts
    })
}

fn elements(info: &TensorInfo) -> u64 {
    info.shape.iter().map(|&extent| extent as u64).product()
}

fn byte_count(info: &TensorInfo) -> u64 {
    elements(info) * info.dtype.bitsize() as u64 / 8
}

fn size(bytes: u64) -> String {
    let mebibytes = bytes as f64 / (1 << 20) as f64;
    if mebibytes < 1024.0 { format!("{mebibytes:.1} MiB") } else { format!("{:.2} GiB", mebibytes / 1024.0) }
}
