// Reads the values off a chart where the pointer is; without it the page says all the same.
const LEFT = 54, RIGHT = 428, TOP = 10, BOTTOM = 228;
const short = (v) => Number(v.toPrecision(4)).toString();
for (const svg of document.querySelectorAll("svg.chart")) {
  const out = svg.parentElement.querySelector("output");
  const [x0, x1] = svg.dataset.x.split(",").map(Number);
  const [y0, y1, log] = svg.dataset.y.split(",").map(Number);
  const lines = [...svg.querySelectorAll("polyline")].map((line) => [
    line.dataset.name,
    line.getAttribute("points").split(" ").filter(Boolean).map((p) => p.split(",").map(Number)),
  ]);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const told = lines.filter(([, points]) => points.length).map(([name, points]) => {
      const [x, y] = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      const up = (BOTTOM - y) / (BOTTOM - TOP);
      const value = log ? y0 * (y1 / y0) ** up : y0 + up * (y1 - y0);
      const across = x0 + ((x - LEFT) / (RIGHT - LEFT)) * (x1 - x0);
      return `${name} ${short(value)} at ${short(across)}`;
    });
    out.textContent = told.join(" · ");
  });
  svg.addEventListener("pointerleave", () => (out.textContent = ""));
}
