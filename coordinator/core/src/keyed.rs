/// Values under keys that are never used twice: an index that is reused, beside a count of its uses.
/// A key from an earlier use finds nothing.
#[derive(Debug)]
pub(crate) struct Keyed<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
}

#[derive(Debug)]
struct Entry<T> {
    uses: u32,
    value: Option<T>,
}

impl<T> Default for Keyed<T> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }
}

impl<T> Keyed<T> {
    pub(crate) fn insert(&mut self, value: T) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry { uses: 0, value: None });
            // Four billion at once would have filled the memory long before.
            u32::try_from(self.entries.len() - 1).unwrap_or(u32::MAX)
        });
        let entry = &mut self.entries[index as usize];
        entry.uses = entry.uses.wrapping_add(1);
        entry.value = Some(value);
        u64::from(entry.uses) << 32 | u64::from(index)
    }

    pub(crate) fn get(&self, key: u64) -> Option<&T> {
        let (uses, index) = split(key);
        self.entries.get(index).filter(|entry| entry.uses == uses)?.value.as_ref()
    }

    pub(crate) fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        let (uses, index) = split(key);
        self.entries.get_mut(index).filter(|entry| entry.uses == uses)?.value.as_mut()
    }

    pub(crate) fn remove(&mut self, key: u64) -> Option<T> {
        let (uses, index) = split(key);
        let entry = self.entries.get_mut(index).filter(|entry| entry.uses == uses)?;
        let value = entry.value.take()?;
        self.free.push(u32::try_from(index).unwrap_or(u32::MAX));
        Some(value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.entries.iter().enumerate().filter_map(|(index, entry)| {
            let key = u64::from(entry.uses) << 32 | index as u64;
            entry.value.as_ref().map(|value| (key, value))
        })
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries.iter_mut().filter_map(|entry| entry.value.as_mut())
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }
}

fn split(key: u64) -> (u32, usize) {
    let half = |bits: u64| u32::try_from(bits & u64::from(u32::MAX)).unwrap_or_default();
    (half(key >> 32), half(key) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_key_finds_nothing_in_a_reused_place() {
        let mut keyed = Keyed::default();
        let first = keyed.insert("a");
        assert_eq!(keyed.remove(first), Some("a"));
        let second = keyed.insert("b");
        assert_eq!((first & 0xffff_ffff, keyed.len()), (second & 0xffff_ffff, 1));
        assert_eq!(keyed.remove(first), None);
        assert_eq!(keyed.get(first), None);
        assert_eq!(keyed.get(second), Some(&"b"));
        assert_eq!(keyed.iter().collect::<Vec<_>>(), [(second, &"b")]);
    }
}
