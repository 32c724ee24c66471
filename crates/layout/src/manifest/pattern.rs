//! [`Pattern`]: a tensor name with places for the block's number, a number within the block, and "weight" or "bias".

/// Real models have fewer than a hundred blocks; a name with a larger number is no block.
const MOST_DIGITS: usize = 4;

/// A name with `{n}` (block number), `{m}` (number within the block) and `{p}` (parameter: weight or bias).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Pattern {
    text: String,
    parts: Vec<PatternPart>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum PatternPart {
    Literal(String),
    Number,
    Inner,
    Parameter,
}

/// What stood in a pattern's places.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Captures {
    pub number: Option<usize>,
    pub inner: Option<usize>,
    pub parameter: Option<ParameterKind>,
}

/// Which parameter of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ParameterKind {
    Weight,
    Bias,
}

impl ParameterKind {
    pub const ALL: [Self; 2] = [Self::Weight, Self::Bias];

    fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Bias => "bias",
        }
    }
}

impl Pattern {
    /// Reads a pattern.
    pub fn new(text: &str) -> Self {
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some(start) = rest.find('{') {
            let (literal, tail) = rest.split_at(start);
            let place = match tail.get(..3) {
                Some("{n}") => PatternPart::Number,
                Some("{m}") => PatternPart::Inner,
                Some("{p}") => PatternPart::Parameter,
                _ => break,
            };
            parts.extend([PatternPart::Literal(literal.to_owned()), place]);
            rest = &tail[3..];
        }
        parts.push(PatternPart::Literal(rest.to_owned()));
        Self { text: text.to_owned(), parts }
    }

    /// What stands in the places of `name`, if all of it fits.
    pub fn captures(&self, name: &str) -> Option<Captures> {
        self.captures_start(name).filter(|(_, rest)| rest.is_empty()).map(|(captures, _)| captures)
    }

    /// What stands in the places if `name` begins as the pattern says, and the rest of `name`.
    pub fn captures_start<'a>(&self, name: &'a str) -> Option<(Captures, &'a str)> {
        let mut captures = Captures::default();
        let mut rest = name;
        for part in &self.parts {
            rest = part.take(rest, &mut captures)?;
        }
        Some((captures, rest))
    }

    /// The name with the places filled.
    pub fn fill(&self, captures: Captures) -> String {
        let part = |part: &PatternPart| match part {
            PatternPart::Literal(literal) => literal.clone(),
            PatternPart::Number => captures.number.map_or_else(String::new, |number| number.to_string()),
            PatternPart::Inner => captures.inner.map_or_else(String::new, |number| number.to_string()),
            PatternPart::Parameter => captures.parameter.map_or("", ParameterKind::name).to_owned(),
        };
        self.parts.iter().map(part).collect()
    }

    /// The pattern as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it has a place for a block's number.
    pub fn is_numbered(&self) -> bool {
        self.parts.contains(&PatternPart::Number)
    }

    /// Whether it has a place for "weight" or "bias".
    pub fn is_layer(&self) -> bool {
        self.parts.contains(&PatternPart::Parameter)
    }
}

impl PatternPart {
    fn take<'a>(&self, text: &'a str, captures: &mut Captures) -> Option<&'a str> {
        match self {
            Self::Literal(literal) => text.strip_prefix(literal.as_str()),
            Self::Number => take_equal(text, &mut captures.number),
            Self::Inner => take_equal(text, &mut captures.inner),
            Self::Parameter => {
                let parameter = ParameterKind::ALL.into_iter().find(|parameter| text.starts_with(parameter.name()))?;
                captures.parameter = Some(parameter);
                text.strip_prefix(parameter.name())
            }
        }
    }
}

/// The rest of `text` after a number, which must be the one captured before, if any.
fn take_equal<'a>(text: &'a str, captured: &mut Option<usize>) -> Option<&'a str> {
    let (number, rest) = take_number(text)?;
    (*captured.get_or_insert(number) == number).then_some(rest)
}

fn take_number(text: &str) -> Option<(usize, &str)> {
    let end = text.bytes().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    let canonical = (1..=MOST_DIGITS).contains(&end) && (end == 1 || !digits.starts_with('0'));
    canonical.then(|| digits.parse().ok()).flatten().map(|number| (number, rest))
}

/// Whether `name` fits `pattern`, in which each `*` stands for any text.
pub fn glob(pattern: &str, name: &str) -> bool {
    let Some((start, mut rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(start) else { return false };
    while let Some((middle, tail)) = rest.split_once('*') {
        let Some(at) = name.find(middle) else { return false };
        (name, rest) = (&name[at + middle.len()..], tail);
    }
    name.ends_with(rest)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn captures_and_fills() {
        let pattern = Pattern::new("blocks.{n}.attn.{p}");
        let captures = pattern.captures("blocks.12.attn.bias").unwrap();
        assert_eq!(captures, Captures { number: Some(12), inner: None, parameter: Some(ParameterKind::Bias) });
        assert_eq!(pattern.fill(captures), "blocks.12.attn.bias");
        for wrong in ["blocks.012.attn.bias", "blocks..attn.bias", "blocks.12345.attn.bias", "blocks.1.attn.biases"] {
            assert_eq!(pattern.captures(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn numbers_within_blocks_are_their_own() {
        let pattern = Pattern::new("up.{n}.block.{m}.conv.{p}");
        let captures = pattern.captures("up.3.block.1.conv.weight").unwrap();
        assert_eq!((captures.number, captures.inner), (Some(3), Some(1)));
        assert_eq!(pattern.fill(captures), "up.3.block.1.conv.weight");
        assert_eq!(pattern.captures("up.3.block.x.conv.weight"), None);
    }

    #[test]
    fn stars_stand_for_any_text() {
        for (pattern, name, fits) in [
            ("a.*", "a.b", true),
            ("*.b", "a.b", true),
            ("*.b", "ab", false),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abde", false),
            ("ab*b", "ab", false),
            ("a", "ab", false),
        ] {
            assert_eq!(glob(pattern, name), fits, "{pattern} {name}");
        }
    }
}
