// ---- pictures of the two arrays of a step and of their difference, see minitp/compare/picture.py ----
const NOT_FINITE = -128, DIFFERENT = 255, CALM_DECADES = 4;  // decades below the tolerance that have a color
function openPicture([shape, scale, rms, rows, columns, ...texts]) {
  const [a, b, difference] = texts.map(text => Uint8Array.from(atob(text), char => char.charCodeAt(0)));
  return { shape, scale, rms, rows, columns, a: new Int8Array(a.buffer), b: new Int8Array(b.buffer), difference };
}
const starts = (n, blocks) => range(blocks + 1).map(i => Math.floor(i * n / blocks));  // and the end of the last block
const differenceOf = (picture, code) => code === 0 ? 0 : code === DIFFERENT ? Infinity : picture.rms * 10 ** ((code - 1) / 20 - 10);
function shadesOf(looks) {  // 33 colors of each ramp
  const probe = h('i', { hidden: '' });
  document.body.append(probe);
  const found = {};
  for (const look of looks) found[look] = range(33).map(i => {
    probe.className = `pixel ${look}`;
    probe.style.setProperty('--t', i / 32);
    return getComputedStyle(probe).backgroundColor;
  });
  probe.remove();
  return look => found[look.name][Math.round(32 * look.t)];
}
function valueLook(code) {
  if (code === NOT_FINITE) return { name: 'odd', t: 0 };
  return { name: code < 0 ? 'negative' : 'positive', t: Math.abs(code) / 127 };
}
function differenceLook(picture, code, tolerance) {  // pale far below the tolerance, and red far above it
  if (code === 0) return { name: 'calm', t: 0 };
  const times = Math.log10(differenceOf(picture, code) / picture.rms / tolerance);
  if (times <= 0) return { name: 'calm', t: clamp(1 + times / CALM_DECADES, 0.12, 1) };
  return { name: 'over', t: clamp(times / Math.max(1, -Math.log10(tolerance)), 0, 1) };
}
function blockText(picture, r, c) {  // the indices of the elements in a block
  const { shape, rows, columns } = picture, width = shape.at(-1) ?? 1, height = shape.slice(0, -1).reduce((n, m) => n * m, 1);
  const [r0, r1] = starts(height, rows).slice(r, r + 2), [c0, c1] = starts(width, columns).slice(c, c + 2);
  const span = (from, to) => to - from === 1 ? String(from) : `${from} to ${to - 1}`;
  if (r1 - r0 > 1) return `rows ${span(r0, r1)}, columns ${span(c0, c1)}`;
  const index = [];
  for (let i = shape.length - 2, left = r0; i >= 0; i--) { index.unshift(left % shape[i]); left = Math.floor(left / shape[i]); }
  return `[${[...index, span(c0, c1)].join(', ')}]`;
}
function blockOf(picture, index) {  // the block [r, c] of an element
  const { shape, rows, columns } = picture;
  const row = index.slice(0, -1).reduce((sum, i, axis) => sum * shape[axis] + i, 0), height = shape.slice(0, -1).reduce((n, m) => n * m, 1);
  const block = (i, n, blocks) => starts(n, blocks).findLastIndex(start => start <= i);
  return [block(row, height, rows), block(index.at(-1) ?? 0, shape.at(-1) ?? 1, columns)];
}
function makePicture(picture, name, looks, colorOf, spot) {
  const { rows, columns } = picture, canvas = h('canvas', { width: columns, height: rows, role: 'img', 'aria-label': name,
    style: `height:${rows * clamp(Math.floor(150 / rows), 3, 14)}px` });
  const context = canvas.getContext('2d');
  looks.forEach((look, i) => {
    context.fillStyle = colorOf(look);
    context.fillRect(i % columns, Math.floor(i / columns), 1, 1);
  });
  const number = code => code === NOT_FINITE ? 'not finite' : `${code === 0 ? '' : '≈ '}${full(+(code * picture.scale / 127).toPrecision(2))}`;
  canvas.addEventListener('pointermove', event => {
    const box = canvas.getBoundingClientRect(), at = (x, length, n) => clamp(Math.floor(x / length * n), 0, n - 1);
    const r = at(event.clientY - box.top, box.height, rows), c = at(event.clientX - box.left, box.width, columns), i = r * columns + c;
    tip(event, [blockText(picture, r, c), `A ${number(picture.a[i])}`, `B ${number(picture.b[i])}`,
      `difference ${brief(differenceOf(picture, picture.difference[i]))}`].join('\n'));
  });
  canvas.addEventListener('pointerleave', () => tip());
  const ring = spot && h('i', { class: 'spot', style: `left:${100 * (spot[1] + 0.5) / columns}%;top:${100 * (spot[0] + 0.5) / rows}%` });
  return [h('h4', {}, name), h('div', { class: 'canvas' }, canvas, ring)];
}
function rampLegend(looks, texts) {
  return h('div', { class: 'ramp' }, h('i', {}, looks.map(look => h('b', { class: look }))), h('div', {}, texts.map(text => h('span', {}, text))));
}
function pictures(cell) {
  const packed = cell && data.pictures?.[cell.number];
  if (!packed) return [];
  const picture = openPicture(packed), tolerance = Math.max(cell.bounded?.bound ?? 0, 1e-9);
  const { shape, rows, columns, scale, rms } = picture, index = !cell.ok && cell.worst[0]?.[0], spot = index ? blockOf(picture, index) : null;
  const colorOf = shadesOf(['positive', 'negative', 'odd', 'calm', 'over']);
  const axes = data.axes[stepOf(cell.row, cell.col)]?.split(' ') ?? [], height = shape.slice(0, -1).reduce((n, m) => n * m, 1);
  const reduced = rows < height || columns < (shape.at(-1) ?? 1);
  const sides = axes.length > 1 ? `Rows are ${axes.slice(0, -1).join(', ')}, columns ${axes.at(-1)}.` : '';
  const words = reduced ? `${rows} × ${columns} blocks of [${shape.join(', ')}]; each shows its largest element.` : `[${shape.join(', ')}], each element.`;
  const values = codes => [...codes].map(valueLook);
  return [h('figure', { class: 'pictures' },
    makePicture(picture, 'A', values(picture.a), colorOf, spot), makePicture(picture, 'B', values(picture.b), colorOf, spot),
    rampLegend(['negative', 'positive'], [brief(-scale), '0', brief(scale)]),
    makePicture(picture, '|B − A|', [...picture.difference].map(code => differenceLook(picture, code, tolerance)), colorOf, spot),
    rampLegend(['calm', 'over'], ['0', `${brief(rms * tolerance)}, the tolerance`, brief(rms)]),
    h('figcaption', {}, [words, sides].join(' ')))];
}
