// Scenes in frames: they get the page's theme, and say how tall they are.
const frames = () => [...document.querySelectorAll("iframe.scene")];
const tell = (frame) => frame.contentWindow?.postMessage({ theme: document.documentElement.dataset.theme }, "*");
addEventListener("message", ({ data, source }) => {
  const frame = data?.scene && frames().find((frame) => frame.contentWindow === source);
  if (!frame) return;
  frame.style.height = `${data.height}px`;
  tell(frame);
});
new MutationObserver(() => frames().forEach(tell)).observe(document.documentElement, { attributeFilter: ["data-theme"] });
