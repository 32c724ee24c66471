//! `full`: every token attends to every token.

use super::{Policy, PolicyForm, PolicySettings};

pub(super) const FORM: PolicyForm = PolicyForm { name: "full", usage: "full", parse, write };

fn parse(settings: PolicySettings<'_>) -> Result<Policy, String> {
    match settings {
        [] => Ok(Policy::Full),
        [(key, _), ..] => Err(format!("unknown setting {key:?}")),
    }
}

fn write(policy: &Policy) -> Option<String> {
    matches!(policy, Policy::Full).then(|| FORM.name.to_owned())
}
