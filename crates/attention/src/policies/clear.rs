//! `clear:r=R[,d=D]`: image tokens attend to those within a radius, optionally to pooled context (CLEAR, section 3.2).

use super::{Policy, PolicyForm, PolicySettings};
use crate::Radius;
use std::ops::RangeInclusive;

pub(super) const FORM: PolicyForm = PolicyForm { name: "clear", usage: "clear:r=R[,d=D]", parse, write };

/// Sides of a pooled cell; larger ones would average more tokens than most images have along a side.
const POOLS: RangeInclusive<usize> = 2..=256;

fn parse(settings: PolicySettings<'_>) -> Result<Policy, String> {
    let mut radius = None;
    let mut pool = None;
    for (key, value) in settings {
        match *key {
            "r" => radius = Some(parse_radius(value)?),
            "d" => pool = Some(parse_pool(value)?),
            _ => return Err(format!("unknown setting {key:?}")),
        }
    }
    Ok(Policy::Clear { radius: radius.ok_or("r is missing")?, pool })
}

fn write(policy: &Policy) -> Option<String> {
    match policy {
        Policy::Clear { radius, pool: None } => Some(format!("{}:r={radius}", FORM.name)),
        Policy::Clear { radius, pool: Some(pool) } => Some(format!("{}:r={radius},d={pool}", FORM.name)),
        _ => None,
    }
}

fn parse_radius(value: &str) -> Result<Radius, String> {
    let tokens = value.parse().map_err(|_| format!("r={value:?} is not a number"))?;
    Radius::new(tokens).map_err(|error| error.to_string())
}

fn parse_pool(value: &str) -> Result<usize, String> {
    let pool = value.parse().ok().filter(|pool| POOLS.contains(pool));
    pool.ok_or_else(|| format!("d={value:?} is not an integer from {} to {}", POOLS.start(), POOLS.end()))
}
