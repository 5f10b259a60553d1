//! How the KV heads of one rank lie in a block, in words that both sides of a handoff understand.

use std::{fmt, str::FromStr};

/// A block's memory order, down to pieces that hold one head alone.
///
/// As text, in a [`Compatibility`](crate::Compatibility): `FLASH_ATTN/8/32*k2.t16.h4.256` is a model of 8 KV heads
/// in the format of that attention backend; a block of this rank is 32 pages (layers), and each page, from
/// the outside in, 2 (keys, values) × 16 tokens × 4 heads × 256 bytes. Runs of layers that are laid out
/// differently are joined by `+`. Axes that are not named lie inside the last piece, whose own order is the
/// format's affair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    /// What the pieces are inside, by the name of who lays them out.
    format: String,
    /// KV heads of the model, on all ranks together.
    heads: u32,
    pages: Vec<Pages>,
}

/// Layers that are laid out alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pages {
    pub(crate) layers: u32,
    /// The outermost first, each once at most, and [`Axis::Head`] among them.
    pub(crate) axes: Vec<(Axis, u32)>,
    pub(crate) cell_bytes: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Axis {
    /// Keys, then values.
    Kv,
    Token,
    Head,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no layout of KV heads: {reason} \
     (one is FLASH_ATTN/8/32*k2.t16.h4.256: format/heads/layers*axes.bytes)"
)]
pub struct HeadLayoutError {
    text: String,
    reason: &'static str,
}

impl HeadLayout {
    /// KV heads of the model, on all ranks together.
    pub fn heads(&self) -> u32 {
        self.heads
    }

    /// Heads in a block of one rank.
    pub fn heads_on_rank(&self) -> u32 {
        self.pages.first().map_or(0, |pages| pages.size_of(Axis::Head))
    }

    /// Bytes of a block of one rank, all layers together; `None` where no memory holds as many.
    pub fn block_bytes(&self) -> Option<u64> {
        self.pages.iter().try_fold(0_u64, |sum, pages| {
            sum.checked_add(pages.page_bytes()?.checked_mul(pages.layers.into())?)
        })
    }

    /// What two layouts share whose blocks can be made of one another: all but the order of the axes and
    /// how many of the heads are on a rank.
    pub(crate) fn kin(&self) -> Self {
        let mut kin = self.clone();
        for pages in &mut kin.pages {
            pages.axes.sort_unstable();
            for (axis, size) in &mut pages.axes {
                if *axis == Axis::Head {
                    *size = 1;
                }
            }
        }
        kin
    }

    pub(crate) fn pages(&self) -> &[Pages] {
        &self.pages
    }
}

impl Pages {
    pub(crate) fn page_bytes(&self) -> Option<u64> {
        self.axes.iter().try_fold(u64::from(self.cell_bytes), |bytes, (_, size)| {
            bytes.checked_mul((*size).into())
        })
    }

    fn size_of(&self, axis: Axis) -> u32 {
        self.axes.iter().find(|(of, _)| *of == axis).map_or(1, |(_, size)| *size)
    }

    fn parse(text: &str) -> Result<Self, &'static str> {
        let (layers, page) = text.split_once('*').ok_or("there is no * behind the layers")?;
        let mut sizes: Vec<&str> = page.split('.').collect();
        let cell_bytes = sizes.pop().ok_or("it has no bytes").and_then(positive)?;
        let mut axes = Vec::new();
        for size in sizes {
            let axis = match size.chars().next() {
                Some('k') => Axis::Kv,
                Some('t') => Axis::Token,
                Some('h') => Axis::Head,
                _ => return Err("an axis is none of k, t and h"),
            };
            if axes.iter().any(|(other, _)| *other == axis) {
                return Err("an axis is named twice");
            }
            axes.push((axis, positive(&size[1..])?));
        }
        if !axes.iter().any(|(axis, _)| *axis == Axis::Head) {
            return Err("no axis is that of the heads (h)");
        }
        Ok(Self { layers: positive(layers)?, axes, cell_bytes })
    }
}

fn positive(text: &str) -> Result<u32, &'static str> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse().ok().filter(|number| is_plain && *number > 0);
    number.ok_or("a number is none from 1 up")
}

impl FromStr for HeadLayout {
    type Err = HeadLayoutError;

    fn from_str(text: &str) -> Result<Self, HeadLayoutError> {
        let error = |reason| HeadLayoutError { text: text.to_owned(), reason };
        let mut parts = text.split('/');
        let (Some(format), Some(heads), Some(pages), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(error("it has not three parts"));
        };
        let pages: Result<Vec<_>, _> = pages.split('+').map(Pages::parse).collect();
        let layout = Self {
            format: format.to_owned(),
            heads: positive(heads).map_err(error)?,
            pages: pages.map_err(error)?,
        };
        let on_rank = layout.heads_on_rank();
        if layout.pages.iter().any(|pages| pages.size_of(Axis::Head) != on_rank) {
            return Err(error("its layers have not equally many heads"));
        }
        Ok(layout)
    }
}

impl fmt::Display for HeadLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/", self.format, self.heads)?;
        for (position, Pages { layers, axes, cell_bytes }) in self.pages.iter().enumerate() {
            let joint = if position > 0 { "+" } else { "" };
            write!(f, "{joint}{layers}*")?;
            for (axis, size) in axes {
                let letter = match axis {
                    Axis::Kv => 'k',
                    Axis::Token => 't',
                    Axis::Head => 'h',
                };
                write!(f, "{letter}{size}.")?;
            }
            write!(f, "{cell_bytes}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_is_read_as_it_is_written() {
        for text in [
            "FLASH_ATTN/8/32*k2.t16.h4.256",
            "CPU_ATTN/3/30*h3.16384",
            "A+B/1/1*t16.k2.h1.4+2*h1.16",
        ] {
            let layout: HeadLayout = text.parse().unwrap();
            assert_eq!(layout.to_string(), text);
        }
        let layout: HeadLayout = "F/8/32*k2.t16.h4.256".parse().unwrap();
        assert_eq!((layout.heads(), layout.heads_on_rank()), (8, 4));
        assert_eq!(layout.block_bytes(), Some(32 * 2 * 16 * 4 * 256));
    }

    #[test]
    fn what_is_no_layout_says_why() {
        for (text, reason) in [
            ("F/8", "three parts"),
            ("F/8/1*h1.4/x", "three parts"),
            ("F/0/1*h1.4", "a number"),
            ("F/8/h1.4", "no *"),
            ("F/8/1*h1", "a number"),
            ("F/8/1*h+1.4", "a number"),
            ("F/8/1*t16.4", "no axis is that of the heads"),
            ("F/8/1*h1.h1.4", "twice"),
            ("F/8/1*x1.h1.4", "none of k, t and h"),
            ("F/8/1*é1.h1.4", "none of k, t and h"),
            ("F/8/1*h1.4+1*h2.4", "equally many"),
        ] {
            let told = text.parse::<HeadLayout>().unwrap_err().to_string();
            assert!(told.contains(reason) && told.contains(text), "{told}");
        }
        let huge: HeadLayout = "F/8/4294967295*h4294967295.4294967295".parse().unwrap();
        assert_eq!(huge.block_bytes(), None);
    }
}
