"""Questions to a browser about a page, and faults that no page may have."""

from dataclasses import dataclass, field


PHONE, DESKTOP = (390, 844), (1280, 900)

# Everything that a reader could open is opened, and what lies outside of the screen is named.
LOOK = """() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const width = document.documentElement.clientWidth;
  const inScroll = e => e.parentElement && (e.parentElement.closest('.scroll') !== null);
  const wide = [...document.body.querySelectorAll('*')].filter(e => !inScroll(e))
    .filter(e => e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 120));
  const small = [...document.body.querySelectorAll('*')].filter(e => [...e.childNodes].some(
      n => n.nodeType === 3 && n.textContent.trim()) && !(e instanceof SVGElement))
    .filter(e => parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.outerHTML.slice(0, 120));
  return {
    title: document.title,
    text: document.body.innerText,
    overflow: document.documentElement.scrollWidth - width,
    wide, small,
    images: [...document.images].map(i => i.naturalWidth),
    scripts: document.scripts.length,
    background: getComputedStyle(document.body).backgroundColor,
  };
}"""


@dataclass
class Look:
    """
    What the browser saw of a page.

    Attributes:
        seen: by `LOOK`.
        errors: of the console and of scripts.
        requests: for anything but the page itself and what it holds.
    """

    seen: dict = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """List the faults that no page may have."""
        found = [f"console: {error}" for error in self.errors]
        found += [f"request: {url}" for url in self.requests]
        found += [f"image {i} does not decode" for i, width in enumerate(self.seen["images"]) if not width]
        found += [f"{self.seen['overflow']} pixels too wide: {self.seen['wide'][:3]}"] * (self.seen["overflow"] > 0)
        found += [f"too small to read: {self.seen['small'][:3]}"] * bool(self.seen["small"])
        found += [f"{self.seen['scripts']} scripts"] * bool(self.seen["scripts"])
        return found
