// The read-out under the pointer: the values nearest to it, in the figure's head line.
for (const figure of document.querySelectorAll("figure.chart")) {
  const source = figure.querySelector("script");
  if (!source) continue;
  const { low, high, series } = JSON.parse(source.textContent);
  const plot = figure.querySelector(".plot");
  const cross = figure.querySelector(".cross");
  const readout = figure.querySelector(".readout");
  const nearest = (points, step) => {
    let first = 0, last = points.length - 1;
    while (first < last) {
      const middle = (first + last) >> 1;
      if (points[middle][0] < step) first = middle + 1; else last = middle;
    }
    const before = points[Math.max(0, first - 1)];
    return step - before[0] < points[first][0] - step ? before : points[first];
  };
  const show = (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const step = Math.round(nearest(series[0].points, low + share * (high - low))[0]);
    cross.style.left = `${((step - low) / (high - low)) * 100}%`;
    readout.replaceChildren(`step ${step.toLocaleString("en")}`);
    for (const { label, tone, points } of series) {
      const value = document.createElement("span");
      value.className = tone;
      value.textContent = `${series.length > 1 ? `${label} ` : ""}${nearest(points, step)[1]}`;
      readout.append(value);
    }
    figure.classList.add("reading");
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => figure.classList.remove("reading"));
}
