//! [`Strength`]: how strongly an adapter is applied, overall and in blocks that are selected by name.

/// A factor for the whole adapter, and other factors for some blocks.
#[derive(Debug, Clone, PartialEq)]
pub struct Strength {
    /// Factor for every parameter that `blocks` has none for.
    pub overall: f64,
    /// Factors for parameters whose names contain a text, such as "double", "single_blocks.3" or
    /// "text_encoder".
    pub blocks: Vec<(String, f64)>,
}

/// The largest factor, of either sign. Adapters are trained for 1; far larger ones only make a model overflow.
const LARGEST: f64 = 1000.0;

impl Default for Strength {
    fn default() -> Self {
        Self { overall: 1.0, blocks: Vec::new() }
    }
}

impl Strength {
    /// Checks that every factor is a number that a model can be computed with.
    ///
    /// # Errors
    /// Which factor is not, and what is expected.
    pub fn check(&self) -> Result<(), String> {
        let overall = std::iter::once((String::new(), self.overall));
        let blocks = self.blocks.iter().map(|(text, factor)| (format!(" of {text:?}"), *factor));
        match overall.chain(blocks).find(|(_, factor)| !(-LARGEST..=LARGEST).contains(factor)) {
            None => Ok(()),
            Some((of, found)) => {
                Err(format!("the strength{of}: expected a number from -{LARGEST} to {LARGEST}, found {found:?}"))
            }
        }
    }

    /// The factor for a parameter of `component`, given its names in different layouts: that of the longest text in
    /// `blocks` that one of the names contains, else the overall factor.
    pub(crate) fn factor(&self, component: &str, names: &[&str]) -> f64 {
        let names: Vec<String> = names.iter().map(|name| format!("{component}.{name}")).collect();
        let matching = self.blocks.iter().filter(|(text, _)| names.iter().any(|name| contains(name, text)));
        let longest = matching.max_by_key(|(text, _)| text.len());
        longest.map_or(self.overall, |(_, factor)| *factor)
    }

    /// The texts in `blocks` that none of `names` contains. The names begin with their components.
    pub(crate) fn unmatched<'a>(&'a self, names: &[String]) -> Vec<&'a str> {
        let unmatched = self.blocks.iter().filter(|(text, _)| !names.iter().any(|name| contains(name, text)));
        unmatched.map(|(text, _)| text.as_str()).collect()
    }
}

/// Whether `name` contains `text`. A number at the end of `text` must match as a whole: block 1 is not block 11.
fn contains(name: &str, text: &str) -> bool {
    let is_digit = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_digit);
    name.match_indices(text).any(|(start, _)| {
        let last = text.as_bytes().last();
        let next = name.as_bytes().get(start + text.len());
        !(is_digit(last) && is_digit(next))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strength_is_a_number_of_ordinary_size() {
        let strength = |overall, block| Strength { overall, blocks: vec![("double".to_owned(), block)] };
        for factor in [0.0, 1.0, -1000.0, 1000.0] {
            assert_eq!(strength(factor, factor).check(), Ok(()));
        }
        for (factor, found) in [(f64::NAN, "NaN"), (f64::NEG_INFINITY, "-inf"), (1e30, "1e30"), (-1000.5, "-1000.5")] {
            let expected = format!(": expected a number from -1000 to 1000, found {found}");
            assert_eq!(strength(factor, 1.0).check(), Err(format!("the strength{expected}")));
            assert_eq!(strength(1.0, factor).check(), Err(format!("the strength of \"double\"{expected}")));
        }
    }

    #[test]
    fn the_longest_matching_text_decides() {
        let blocks = [("double", 0.5), ("double_blocks.1", 2.0), ("text_encoder", 0.0)];
        let strength = Strength { overall: 0.8, blocks: blocks.map(|(text, factor)| (text.to_owned(), factor)).into() };
        let factor_of_block = |block| {
            let canonical = format!("transformer_blocks.{block}.attn.to_q.weight");
            strength.factor("transformer", &[&canonical, &format!("double_blocks.{block}.img_attn.qkv.weight")])
        };
        assert_eq!(factor_of_block(0), 0.5);
        assert_eq!(factor_of_block(1), 2.0);
        assert_eq!(factor_of_block(11), 0.5);
        assert_eq!(strength.factor("text_encoder_2", &["encoder.block.0"]), 0.0);
        assert_eq!(strength.factor("transformer", &["proj_out.weight"]), 0.8);
        assert_eq!(
            strength.unmatched(&["transformer.double_blocks.0".to_owned()]),
            ["double_blocks.1", "text_encoder"]
        );
    }
}
