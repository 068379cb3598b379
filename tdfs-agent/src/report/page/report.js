'use strict';
// Names in the data are those of an image: they become text nodes and nothing else.
(() => {
  const page = document.documentElement;
  const byId = (id) => document.getElementById(id);
  const fail = (message) => {
    page.dataset.error = String(message);
    const box = byId('error');
    box.hidden = false;
    box.textContent = `This page could not be drawn completely: ${message}`;
  };
  window.addEventListener('error', (event) => fail(event.message));
  window.addEventListener('unhandledrejection', (event) => fail(event.reason));
  document.addEventListener('securitypolicyviolation', (event) => fail(`${event.violatedDirective} ${event.blockedURI}`));

  const data = JSON.parse(byId('data').textContent);
  const { recording, start } = data;

  // ---- Elements -----------------------------------------------------------------------------------------------------

  const tips = new WeakMap();
  const SVG = 'http://www.w3.org/2000/svg';

  const fill = (element, attributes, children) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name === 'tip') tips.set(element, value);
      else if (name === 'on') for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
      else if (name === 'css') for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
      else element.setAttribute(name, value === true ? '' : value);
    }
    element.append(...children.flat().filter((c) => c !== undefined && c !== null && c !== ''));
    return element;
  };
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

  // ---- Numbers ------------------------------------------------------------------------------------------------------

  const round = (value, digits) => value.toLocaleString('en', { maximumFractionDigits: digits, minimumFractionDigits: digits });
  const count = (value) => Math.round(value || 0).toLocaleString('en');
  const bytes = (value) => {
    if (value < 1000) return `${count(value)} B`;
    const units = ['kB', 'MB', 'GB', 'TB'];
    let n = -1;
    do { value /= 1000; n += 1; } while (value >= 999.5 && n < 3);
    return `${round(value, value < 9.95 ? 1 : 0)} ${units[n]}`;
  };
  const ms = (value) => {
    if (value >= 9999.5) return `${round(value / 1000, 1)} s`;
    if (!value) return '0 ms';
    return `${round(value, value < 0.095 ? 2 : value < 9.95 ? 1 : 0)} ms`;
  };
  const percent = (part, whole) => {
    const share = whole > 0 ? (100 * part) / whole : 0;
    if (share > 0 && share < 0.1) return '< 0.1 %';
    return `${round(share, share < 9.95 && share > 0 ? 1 : 0)} %`;
  };
  const plural = (n, one, many = `${one}s`) => `${count(n)} ${Math.round(n) === 1 ? one : many}`;
  const short = (digest) => String(digest).replace('sha256:', '').slice(0, 12);
  const digest = (value) => h('code', { title: String(value) }, short(value));
  const layerName = (n) => (n === null || n === undefined ? '–' : `layer ${n + 1}`);
  /// Round numbers, from 0 to about `end`.
  const ticks = (end, wanted) => {
    if (!(end > 0)) return [0];
    const rough = end / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * power).find((f) => f >= rough);
    return Array.from({ length: Math.floor(end / step + 1e-9) + 1 }, (_, n) => n * step);
  };
  /// The colour of a share: some is never shown as nothing.
  const heat = (share, colour = '--all') => {
    if (!(share > 0)) return 'var(--none)';
    return `color-mix(in oklab, var(${colour}) ${Math.round(Math.min(100, 14 + 86 * share))}%, var(--none))`;
  };

  // ---- Parts of the page --------------------------------------------------------------------------------------------

  const main = byId('main');
  const section = (id, title, note, ...children) => {
    byId('contents').append(h('a', { href: `#${id}` }, title));
    const made = h('section', { id, 'aria-labelledby': `${id}-title` }, h('h3', { id: `${id}-title` }, title), h('p', { class: 'note' }, note), ...children);
    main.append(made);
    return made;
  };
  const part = (title) => start && recording && main.append(h('h2', { class: 'part' }, title));
  const tiles = (list) => main.append(h('dl', { class: 'tiles' }, list.map(([label, value, detail, id, lead]) => h('div', { class: lead ? 'tile lead' : 'tile' }, h('dt', {}, label), h('dd', { class: 'value', id }, value), h('dd', { class: 'detail' }, detail)))));
  /// A table; lines beyond the first ones wait for a click, the one that sums up the others is always there.
  const table = (caption, columns, rows, state = {}) => {
    const few = 14;
    const line = (row) => h('tr', { class: row.rest && 'rest' }, columns.map((c) => h('td', { class: c.class || (c.number && 'number') }, c.cell(row))));
    const body = h('tbody', {});
    const hidden = () => (state.all || rows.length <= few + 2 ? 0 : rows.filter((row, n) => n >= few && !row.rest).length);
    const show = () => {
      const left = hidden();
      body.replaceChildren(...rows.filter((row, n) => !left || n < few || row.rest).map(line));
      more.hidden = !left;
      more.textContent = `Show ${count(left)} more`;
    };
    const more = h('button', { type: 'button', class: 'more', on: { click: () => { state.all = true; show(); } } });
    show();
    return h('div', { class: 'scroll' }, h('table', {},
      caption && h('caption', {}, caption),
      h('thead', {}, h('tr', {}, columns.map((c) => h('th', { scope: 'col', class: c.number && 'number' }, c.title)))),
      body), more);
  };
  const folded = (title, ...children) => h('details', {}, h('summary', {}, title), ...children);
  const choice = (label, options, chosen, choose) => {
    const buttons = options.map(([value, text]) => h('button', { type: 'button', 'aria-pressed': String(value === chosen), on: { click: () => {
      buttons.forEach((b, n) => b.setAttribute('aria-pressed', String(options[n][0] === value)));
      choose(value);
    } } }, text));
    return h('span', {}, label, ' ', h('span', { class: 'choice', role: 'group', 'aria-label': label }, buttons));
  };
  const legend = (...entries) => h('p', { class: 'legend' }, entries.map(([colour, text]) => h('span', {}, h('i', { css: { background: colour } }), text)));
  const ramp = (from, to, colour = '--all') => h('p', { class: 'legend' }, h('span', {}, from, h('i', { class: 'ramp', css: { background: `linear-gradient(90deg, ${[0, 0.001, 0.25, 0.5, 0.75, 1].map((v) => heat(v, colour)).join(',')})` } }), to));
  const meter = (share) => h('span', { class: 'meter' }, h('b', { css: { width: `${100 * Math.min(1, share || 0)}%` } }));

  /// A picture that is drawn anew whenever its width changes.
  const drawings = [];
  const drawing = (label, draw) => {
    const host = h('div', {});
    const redraw = () => {
      const width = Math.max(280, Math.floor(host.clientWidth));
      const { height, content } = draw(width);
      host.replaceChildren(s('svg', { viewBox: `0 0 ${width} ${height}`, height, role: 'img', 'aria-label': label }, content));
    };
    drawings.push(redraw);
    return { host, redraw };
  };
  const fitted = (text, width, size = 6.6) => {
    const room = Math.floor(width / size);
    if (text.length <= room) return text;
    return room < 4 ? '' : `${text.slice(0, room - 1)}…`;
  };

  // ---- Start --------------------------------------------------------------------------------------------------------

  const stageColours = { resolve: '--c0', diff: '--c1', pull: '--c2', fetch: '--c2', mount: '--c3', create: '--c4', ready: '--c5' };
  const stageWords = {
    resolve: 'find manifests and metadata', diff: 'compare with the pages present', pull: 'fetch all layers: there is no runtime image',
    fetch: 'fetch and verify missing pages', mount: 'write EROFS metadata, mount', create: 'create the container and start its process', ready: 'the process runs until it is ready',
  };

  const clock = ({ timeline }) => {
    const ready = Number(timeline.start.total_ms) || 0;
    const last = Math.max(ready, timeline.until_ms, ...timeline.stages.map((e) => e.end_ms));
    let all = last <= ready * 2;
    const { samples, bytes_missing: total, pages_missing: missing } = timeline.arrivals;
    const lanes = [['waits', 'Reads that waited', '--wait', timeline.waits.reads], ['cold', 'Cold reads', '--cold', timeline.cold.reads]].filter(([, , , reads]) => reads.length);
    const picture = drawing('Stages, arrivals and reads over the time since the command began', (width) => {
      const left = 92;
      const end = (all ? last : ready * 1.06) || 1;
      const span = width - left - 14;
      const x = (at) => left + (span * Math.min(at, end)) / end;
      const content = [];
      const row = 24;
      let y = 22;
      const top = y;
      for (const stage of timeline.stages) {
        const from = x(stage.begin_ms);
        const to = Math.max(from + 1.5, x(stage.end_ms));
        const took = ms(stage.end_ms - stage.begin_ms);
        const inside = to - from > 7 * took.length + 10;
        const before = !inside && to + 7 * took.length + 8 > width;
        content.push(s('text', { x: left - 10, y: y + 15, 'text-anchor': 'end', class: 'title' }, stage.name));
        content.push(s('rect', { x: from, y: y + 3, width: to - from, height: row - 7, rx: 3, css: { fill: `var(${stageColours[stage.name] || '--c0'})` }, tip: [stage.name, stageWords[stage.name], `${took}, from ${ms(stage.begin_ms)} to ${ms(stage.end_ms)}`] }));
        content.push(s('text', { x: inside ? from + 6 : before ? from - 6 : to + 6, y: y + 15, 'text-anchor': before ? 'end' : 'start', class: inside ? 'light inside' : 'soft inside' }, took));
        y += row;
      }
      if (samples.length > 1) {
        y += 26;
        const tall = 110;
        const pages = missing > 0;
        const value = (p) => (pages ? p.pages : p.bytes);
        const most = Math.max(pages ? missing : total, ...samples.map(value), 1);
        const up = (v) => y + tall - (tall * v) / most;
        content.push(s('text', { x: left, y: y - 8, class: 'title' }, pages ? 'Pages arrived and verified' : 'Bytes received'));
        for (const t of ticks(most, 3)) {
          content.push(s('line', { x1: left, x2: width - 14, y1: up(t), y2: up(t), class: 'grid' }));
          content.push(s('text', { x: left - 10, y: up(t) + 4, 'text-anchor': 'end', class: 'soft' }, pages ? count(t) : bytes(t)));
        }
        const shown = samples.filter((p, n) => p.ms <= end || (n > 0 && samples[n - 1].ms <= end));
        let line = `M${x(shown[0].ms)},${up(0)}`;
        let held = 0;
        for (const p of shown) {
          line += `L${x(p.ms)},${up(held)}L${x(p.ms)},${up(value(p))}`;
          held = value(p);
        }
        line += `L${x(Math.min(end, Math.max(last, ready)))},${up(held)}`;
        content.push(s('path', { d: `${line}V${up(0)}Z`, css: { fill: 'var(--c2)', opacity: 0.16 } }));
        content.push(s('path', { d: line, css: { fill: 'none', stroke: 'var(--c2)', 'stroke-width': 2 } }));
        const hover = s('rect', { x: left, y, width: span, height: tall, css: { fill: 'transparent' } });
        tips.set(hover, (event) => {
          const box = hover.getBoundingClientRect();
          const at = (end * (event.clientX - box.left)) / box.width;
          const p = samples.reduce((found, q) => (q.ms <= at ? q : found), { pages: 0, bytes: 0 });
          return [`at ${ms(at)}`, missing > 0 && `${count(p.pages)} of ${plural(missing, 'page')} (${percent(p.pages, missing)})`, `${bytes(p.bytes)} of ${bytes(total)}, compressed`];
        });
        content.push(hover);
        y += tall;
      }
      for (const [, title, colour, reads] of lanes) {
        y += 30;
        const tall = 76;
        const most = Math.max(1, ...reads.map((r) => r.took_ms));
        const decades = Math.max(1, Math.ceil(Math.log10(most) + 1));
        const up = (took) => y + tall - (tall * Math.min(decades, Math.max(0, Math.log10(Math.max(took, 0.1)) + 1))) / decades;
        content.push(s('text', { x: left, y: y - 8, class: 'title' }, `${title}: how long each took`));
        for (let n = 0; n <= decades; n += Math.ceil(decades / 4)) {
          const at = up(10 ** (n - 1));
          content.push(s('line', { x1: left, x2: width - 14, y1: at, y2: at, class: 'grid' }));
          content.push(s('text', { x: left - 10, y: at + 4, 'text-anchor': 'end', class: 'soft' }, n === 0 ? '≤ 0.1 ms' : `${10 ** (n - 1)} ms`));
        }
        for (const read of reads) {
          if (read.ms > end) continue;
          const file = timeline.files[read.file];
          if (x(read.ms + read.took_ms) - x(read.ms) > 3) content.push(s('line', { x1: x(read.ms), x2: x(read.ms + read.took_ms), y1: up(read.took_ms), y2: up(read.took_ms), css: { stroke: `var(${colour})`, 'stroke-width': 2, opacity: 0.35 } }));
          content.push(s('circle', { cx: x(read.ms), cy: up(read.took_ms), r: 2 + Math.min(4, Math.sqrt(read.pages) / 2.5), css: { fill: `var(${colour})`, opacity: 0.65 }, tip: [`/${file.path}`, `page ${count(read.page)} and on, ${plural(read.pages, 'page')}`, `came at ${ms(read.ms)}, took ${ms(read.took_ms)}`, read.error && `failed with errno ${read.error}`] }));
        }
        y += tall;
      }
      y += 8;
      const axis = ticks(end, Math.max(3, Math.floor(width / 130)));
      const lines = axis.map((t) => s('line', { x1: x(t), x2: x(t), y1: top, y2: y, class: 'grid' }));
      content.unshift(...lines);
      content.push(s('line', { x1: left, x2: width - 14, y1: y, y2: y, class: 'axis' }));
      for (const t of axis) content.push(s('text', { x: x(t), y: y + 17, 'text-anchor': 'middle', class: 'soft' }, count(t)));
      content.push(s('text', { x: left, y: y + 35, class: 'soft' }, 'milliseconds since the command began'));
      if (ready > 0) {
        content.push(s('line', { x1: x(ready), x2: x(ready), y1: top - 10, y2: y, class: 'ready' }));
        const early = x(ready) < left + 110;
        content.push(s('text', { x: x(ready) + (early ? 5 : -5), y: top - 6, 'text-anchor': early ? 'start' : 'end', class: 'ready' }, `ready at ${ms(ready)}`));
      }
      return { height: y + 42, content };
    });
    const controls = last > ready * 1.06 ? h('p', { class: 'controls' }, choice('Show', [[false, 'until ready'], [true, `until ${ms(last)}`]], all, (value) => { all = value; picture.redraw(); })) : '';
    const rows = timeline.stages.map((stage) => ({ ...stage, took: stage.end_ms - stage.begin_ms }));
    section('timeline', 'Timeline of the start', 'Stages overlap: pages arrive while the image is mounted and the container is created. Everything is on one clock.', controls, picture.host, folded('Stages as a table', table('', [
      { title: 'stage', cell: (r) => r.name }, { title: 'what it does', cell: (r) => stageWords[r.name] || '' },
      { title: 'began', number: true, cell: (r) => ms(r.begin_ms) }, { title: 'took', number: true, cell: (r) => ms(r.took) },
    ], rows)));
  };

  const readTable = (timeline, sums, columns) => table('', [
    { title: 'file', class: 'path', cell: (r) => (r.file === null ? `${r.files ? plural(r.files, 'other file') : 'reads'}${r.files ? '' : ' that were not kept'}` : `/${timeline.files[r.file].path}`) },
    ...columns,
    { title: 'reads', number: true, cell: (r) => count(r.reads) },
    { title: 'pages', number: true, cell: (r) => count(r.pages) },
    { title: 'first at', number: true, cell: (r) => (r.first_ms === null ? '–' : ms(r.first_ms)) },
    { title: 'took together', number: true, cell: (r) => ms(r.took_ms) },
  ], sums.map((r) => ({ ...r, rest: r.file === null })));

  const drawStart = ({ timeline, waits, cold }) => {
    const report = timeline.start;
    const number = (field) => Number(report[field]) || 0;
    part('The start');
    const lead = ['ready after', ms(number('total_ms')), [report.start_mode, report.start_reason].filter(Boolean).join(': '), 'total_ms', true];
    const coldPages = ['cold pages', count(number('cold_pages')), `in ${plural(number('cold_requests'), 'read')} before ready`, 'cold_pages'];
    tiles(!report.service ? [
      lead,
      ['layers fetched', bytes(number('layer_bytes')), `compressed, ${plural(number('data_requests'), 'request')}`, 'layer_bytes'],
      coldPages,
    ] : [
      lead,
      ['pages needed', count(number('pages_needed')), `${bytes(number('pages_needed') * 4096)} uncompressed`, 'pages_needed'],
      ['on the node before', count(number('pages_present')), percent(number('pages_present'), number('pages_needed')), 'pages_present'],
      ['fetched', count(number('pages_fetched')), `${bytes(number('bytes_fetched'))} compressed, ${plural(number('data_requests'), 'request')}`, 'pages_fetched'],
      ['still on the wire', count(number('pages_awaited')), 'pages, when it was ready', 'pages_awaited'],
      ['waited for', ms(number('waited_ms')), `${plural(number('waited_requests'), 'read')}, all together`, 'waited_ms'],
      coldPages,
    ]);
    clock({ timeline });
    const kinds = (report.service ? [
      ['file not recorded', (f) => f.recorded_pages === 0], ['other pages of the file were recorded', (f) => f.recorded_pages > 0],
    ] : [['there is no runtime image', () => true]]);
    const ready = number('total_ms');
    const phases = [['before ready', (r) => r.ms < ready], ['after ready', (r) => r.ms >= ready]];
    const reasons = phases.flatMap(([phase, when]) => kinds.map(([kind, is]) => {
      const reads = timeline.cold.reads.filter((r) => when(r) && is(timeline.files[r.file]));
      const sum = (field) => reads.reduce((all, r) => all + r[field], 0);
      return { phase, kind, reads: reads.length, pages: sum('pages'), took: sum('took_ms') };
    })).filter((r) => r.reads > 0);
    const coldSection = section('cold', 'What was cold, and why', report.service ? 'Reads of pages that are not in the runtime image came from the image’s own layers, on demand. A runtime image holds what the recorded start read until it was ready; what a service reads later is cold the first time.' : 'Without a runtime image every page comes from the layers when it is read for the first time.');
    if (reasons.length) {
      const most = Math.max(...reasons.map((r) => r.pages));
      coldSection.append(table('', [
        { title: 'when', cell: (r) => r.phase }, { title: 'why', cell: (r) => r.kind }, { title: '', cell: (r) => meter(r.pages / most) },
        { title: 'pages', number: true, cell: (r) => count(r.pages) }, { title: 'reads', number: true, cell: (r) => count(r.reads) }, { title: 'took together', number: true, cell: (r) => ms(r.took) },
      ], reasons), h('p', { class: 'note' }), readTable(timeline, cold, [
        { title: 'layer', cell: (r) => (r.file === null ? '' : layerName(timeline.files[r.file].layer)) },
        ...(report.service ? [{ title: 'recorded pages of it', number: true, cell: (r) => (r.file === null ? '' : `${count(timeline.files[r.file].recorded_pages)} of ${count(timeline.files[r.file].pages)}`) }] : []),
        { title: 'before ready', number: true, cell: (r) => count(r.before_ready) },
      ]));
      if (timeline.cold.lost) coldSection.append(h('p', { class: 'foot' }, `${plural(timeline.cold.lost, 'read')} more are in the sums of the last line and not drawn.`));
    } else coldSection.append(h('p', { class: 'empty' }, `Nothing was cold until ${ms(timeline.until_ms)}.`));
    const waitSection = report.service && section('waits', 'What was waited for', 'Reads of pages of the runtime image that came before the pages. Each overtook everything else on the wire.');
    if (waitSection && waits.length) {
      waitSection.append(readTable(timeline, waits, [{ title: 'before ready', number: true, cell: (r) => count(r.before_ready) }]));
      if (timeline.waits.lost) waitSection.append(h('p', { class: 'foot' }, `${plural(timeline.waits.lost, 'read')} more are in the sums of the last line and not drawn.`));
    } else if (waitSection) waitSection.append(h('p', { class: 'empty' }, 'No read waited for a page on the wire.'));
    const sources = Array.isArray(report.sources) ? report.sources.filter((x) => x && x.source) : [];
    if (sources.length) {
      section('sources', 'Where the pages came from', 'In the order in which the sources were used; a source that failed was left for the next.', table('', [
        { title: 'source', cell: (r) => String(r.source) }, { title: 'pages', number: true, cell: (r) => count(r.pages) }, { title: 'bytes', number: true, cell: (r) => bytes(r.bytes || 0) },
        { title: 'requests', number: true, cell: (r) => count(r.requests) }, { title: 'failures', cell: (r) => Object.entries(r.failures || {}).map(([why, n]) => `${why} ${n}`).join(', ') || '–' },
      ], sources));
    }
  };

  // ---- Recording ----------------------------------------------------------------------------------------------------

  let column = 0;
  const columnListeners = [];
  const columnChoice = () => (recording.columns.length > 1 ? h('p', { class: 'controls columns' }, choice('Touched by', [[0, 'any service'], ...recording.columns.map((name, n) => [n + 1, name])], column, (value) => {
    column = value;
    columnListeners.forEach((listen) => listen());
  })) : '');

  /// Rectangles of these areas that fill the box, as square as can be.
  const squarified = (weights, x, y, width, height) => {
    const total = weights.reduce((a, b) => a + b, 0);
    const boxes = [];
    if (!(total > 0) || width <= 0 || height <= 0) return weights.map(() => [x, y, 0, 0]);
    const scale = (width * height) / total;
    let at = 0;
    while (at < weights.length) {
      const side = Math.min(width, height);
      let end = at;
      let sum = 0;
      let worst = Infinity;
      while (end < weights.length) {
        const next = sum + weights[end] * scale;
        const most = weights[at] * scale;
        const least = Math.max(weights[end] * scale, 1e-9);
        const ratio = Math.max((side * side * most) / (next * next), (next * next) / (side * side * least));
        if (ratio > worst) break;
        [sum, worst] = [next, ratio];
        end += 1;
      }
      const thick = side > 0 ? sum / side : 0;
      let along = 0;
      for (; at < end; at += 1) {
        const length = thick > 0 ? (weights[at] * scale) / thick : 0;
        boxes.push(width >= height ? [x, y + along, thick, length] : [x + along, y, length, thick]);
        along += length;
      }
      if (width >= height) { x += thick; width -= thick; } else { y += thick; height -= thick; }
    }
    return boxes;
  };

  const treemap = () => {
    const nodes = recording.tree;
    const children = nodes.map(() => []);
    nodes.forEach((node, n) => { if (n > 0) children[node.parent].push(n); });
    children.forEach((list) => list.sort((a, b) => nodes[b].bytes - nodes[a].bytes));
    const path = (n) => (n === 0 ? '' : `${path(nodes[n].parent)}/${nodes[n].name}`);
    const name = (n) => nodes[n].name || plural(nodes[n].files, 'smaller file');
    const tip = (n) => {
      const node = nodes[n];
      return [node.name ? path(n) || '/' : `${path(node.parent)}/ …`, `${bytes(node.bytes)} in ${plural(node.files, 'file')}`, `touched: ${bytes(node.touched[column])}, ${percent(node.touched[column], node.bytes)}`, children[n].length ? 'click to enlarge' : ''];
    };
    let root = 0;
    const crumbs = h('p', { class: 'controls crumbs' });
    const picture = drawing('Treemap of the image: area is bytes, colour is the share that was touched', (width) => {
      const height = Math.round(Math.min(600, Math.max(320, width * 0.52)));
      const content = [];
      const open = (n) => { root = n; show(); };
      const place = (n, x, y, w, t, depth) => {
        if (w < 1.5 || t < 1.5) return;
        const node = nodes[n];
        const share = node.bytes > 0 ? node.touched[column] / node.bytes : 0;
        const box = { x, y, width: w, height: t, class: 'node', tip: () => tip(n) };
        const opened = children[n].length > 0 && (n === root || (w > 26 && t > 26 && depth < 7));
        if (!opened) {
          if (children[n].length) Object.assign(box, { class: 'node folder', on: { click: () => open(n) } });
          content.push(s('rect', { ...box, css: { fill: heat(share) } }));
          const text = w > 40 && t > 16 ? fitted(name(n), w - 8) : '';
          if (text) content.push(s('text', { x: x + 4, y: y + 13, class: share > 0.45 ? 'inside light' : 'inside' }, text));
          const part = percent(node.touched[column], node.bytes);
          const facts = [`${part} of ${bytes(node.bytes)}`, part].find((fact) => fact.length * 6.6 < w - 8);
          if (text && facts && t > 34) content.push(s('text', { x: x + 4, y: y + 27, class: share > 0.45 ? 'inside light' : share > 0.1 ? 'inside' : 'inside soft' }, facts));
          return;
        }
        const head = n === root ? 0 : t > 40 && w > 44 ? 17 : 2;
        if (n !== root) {
          content.push(s('rect', { ...box, class: 'node folder', tabindex: depth < 3 && head > 2 ? 0 : undefined, role: depth < 3 && head > 2 ? 'button' : undefined, 'aria-label': depth < 3 && head > 2 ? `open ${path(n)}` : undefined, css: { fill: 'color-mix(in oklab, var(--soft) 22%, var(--card))' }, on: { click: () => open(n), keydown: (e) => { if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); open(n); } } } }));
          if (head > 2) content.push(s('text', { x: x + 4, y: y + 12.5, class: 'inside title' }, fitted(name(n), w - 8, 7)));
        }
        const edge = n === root ? 0 : 2;
        const boxes = squarified(children[n].map((c) => nodes[c].bytes), x + edge, y + head, w - 2 * edge, t - head - edge);
        children[n].forEach((c, i) => place(c, ...boxes[i], depth + 1));
      };
      place(root, 0, 0, width, height, 0);
      return { height, content };
    });
    const show = () => {
      const chain = [];
      for (let n = root; ; n = nodes[n].parent) { chain.unshift(n); if (n === 0) break; }
      crumbs.replaceChildren(...chain.flatMap((n, i) => [i ? '›' : '', h('button', { type: 'button', disabled: n === root, on: { click: () => { root = n; show(); } } }, n === 0 ? 'whole image' : name(n))]), h('span', {}, `${bytes(nodes[root].bytes)}, ${percent(nodes[root].touched[column], nodes[root].bytes)} touched`));
      if (picture.host.isConnected) picture.redraw();
    };
    show();
    columnListeners.push(show);
    section('treemap', 'Touched share by directory and file', 'Area is bytes of files, colour the share of them that was touched until ready. A click on a directory enlarges it.', crumbs, picture.host, ramp('untouched', 'all touched'), h('p', { class: 'foot' }, `${count(nodes.length)} entries are drawn for ${plural(recording.files, 'file')}; small ones are summed up by directory.`));
  };

  const live = (build) => {
    const host = h('div', {});
    const state = {};
    const draw = () => host.replaceChildren(build(state));
    draw();
    columnListeners.push(draw);
    return host;
  };
  const shareCells = [
    { title: 'touched', number: true, cell: (r) => bytes(r.touched[column]) },
    { title: 'share', number: true, cell: (r) => percent(r.touched[column], r.bytes) },
  ];
  const strip = (text) => (text ? h('span', { class: 'strip', 'aria-hidden': 'true' }, [...text].map((d) => h('b', { css: { background: heat(Number(d) / 9) } }))) : '');

  const shares = () => {
    section('layers', 'Touched share by layer', 'Bytes of files that no layer above hides, from the lowest layer up.', live((state) => {
      const most = Math.max(1, ...recording.layers.map((l) => l.bytes));
      return table('', [
        { title: 'layer', cell: (r) => `${r.n + 1}` }, { title: 'blob', cell: (r) => digest(r.digest) }, { title: 'compressed', number: true, cell: (r) => bytes(r.blob_bytes) },
        { title: 'files', number: true, cell: (r) => bytes(r.bytes) },
        { title: '', cell: (r) => h('span', { class: 'meter', css: { width: `${Math.max(0.15, (14 * r.bytes) / most)}rem` } }, h('b', { css: { width: `${r.bytes ? (100 * r.touched[column]) / r.bytes : 0}%` } })) },
        ...shareCells,
      ], recording.layers.map((l, n) => ({ ...l, n })), state);
    }));
    const rest = (rows) => rows.map((r) => ({ ...r, rest: r.path === null }));
    section('directories', 'Touched by directory', 'Files directly in the directory; those of which most was touched first.', live((state) => table('', [
      { title: 'directory', class: 'path', cell: (r) => (r.path === null ? 'all others' : `/${r.path}`) }, { title: 'files', number: true, cell: (r) => count(r.files) },
      { title: 'bytes', number: true, cell: (r) => bytes(r.bytes) }, { title: '', cell: (r) => meter(r.touched[column] / (r.bytes || 1)) }, ...shareCells,
    ], rest(recording.directories), state)));
    section('files', 'Touched by file', 'The strip is the file from its first to its last byte: coloured where any service touched it.', live((state) => table('', [
      { title: 'file', class: 'path', cell: (r) => (r.path === null ? `${plural(r.files, 'other file')}` : `/${r.path}`) }, { title: 'layer', cell: (r) => (r.path === null ? '' : layerName(r.layer)) },
      { title: 'bytes', number: true, cell: (r) => bytes(r.bytes) }, { title: 'from first to last byte', cell: (r) => strip(r.strip) }, ...shareCells,
    ], rest(recording.largest), state)));
  };

  const colours = ['--c2', '--c4', '--c5', '--c1', '--c3', '--c0'];

  const orders = () => {
    section('order', 'Order of first use', 'How the start goes through the image: from left to right the pages in the order in which they were first used, in each line those of one file. A trace has this order and no times.', live((state) => {
      const order = recording.orders[Math.max(0, column - 1)];
      const cells = (text, name) => h('span', { class: 'strip wide', role: 'img', 'aria-label': `order of first use of ${name}` }, [...text].map((d) => h('b', { css: { background: heat(Number(d) / 9, '--one') } })));
      const name = (r) => (r.path === null ? plural(r.files, 'other file') : `/${r.path}`);
      return table(`Service ${order.service}, ${plural(order.pages, 'page')}`, [
        { title: 'file', class: 'path', cell: name }, { title: 'pages', number: true, cell: (r) => count(r.pages) },
        { title: 'first page of the start → ready', class: 'fill', cell: (r) => cells(r.strip, name(r)) },
      ], order.lines.map((r) => ({ ...r, rest: r.path === null })), Object.assign(state, { all: true }));
    }));
  };

  const zoneMap = (zone, n) => {
    let mode = zone.services.length > 1 ? 'uses' : 'order';
    let service = 0;
    const many = recording.services.filter((x) => x.group === zone.group).length;
    const segmentOf = (page) => zone.segments.findIndex((x) => page >= x.base && page < x.base + x.pages);
    const picture = drawing('Heat map of the data zone: one cell per some pages, in the order of the zone', (width) => {
      const columns = Math.max(16, Math.floor(width / 15));
      const size = width / columns;
      const last = zone.services[service] ? Math.max(1, ...zone.services[service].first.map((f) => (f === null ? 0 : f))) : 1;
      const content = zone.uses.map((uses, cell) => {
        const pages = Math.min(zone.cell_pages, zone.pages - cell * zone.cell_pages);
        const own = zone.services[service];
        const segment = segmentOf(cell * zone.cell_pages);
        const colour = mode === 'uses' ? heat(uses / pages / many) : mode === 'segment' ? (segment < 0 ? 'var(--none)' : `var(${colours[segment % colours.length]})`) : own.first[cell] === null ? 'var(--none)' : `color-mix(in oklab, var(--all) ${Math.round(100 * (own.first[cell] / last))}%, var(--one))`;
        const begin = cell * zone.cell_pages;
        return s('rect', { class: 'cell', x: (cell % columns) * size + 0.75, y: Math.floor(cell / columns) * size + 0.75, width: size - 1.5, height: size - 1.5, rx: 2, css: { fill: colour }, tip: () => [
          `zone pages ${count(begin)} to ${count(begin + pages - 1)}`, segment >= 0 ? `segment ${segment + 1}` : 'of no service shown here',
          ...zone.services.map((u) => `${u.service}: ${u.needed[cell] ? `${plural(u.needed[cell], 'page')}, first used after ${percent(u.first[cell], Math.max(1, recording.services.find((x) => x.service === u.service).file_pages))} of the start’s pages` : 'needs nothing'}`)] });
      });
      return { height: Math.ceil(zone.uses.length / columns) * size + 2, content };
    });
    const keys = h('div', {});
    const whose = zone.services.length > 1 ? choice('Order of', zone.services.map((u, i) => [i, u.service]), 0, (value) => { service = value; show(); }) : h('span', {});
    const show = () => {
      whose.hidden = mode !== 'order';
      keys.replaceChildren(mode === 'segment' ? legend(...zone.segments.slice(0, 6).map((x, i) => [`var(${colours[i]})`, `segment ${i + 1}: ${plural(x.pages, 'page')}, ${bytes(x.bytes)} compressed`]), ['var(--none)', 'of no service shown here']) : mode === 'uses' ? ramp('no service', many > 1 ? `all ${many} services` : 'needed') : h('p', { class: 'legend' }, h('span', {}, 'used first', h('i', { class: 'ramp', css: { background: 'linear-gradient(90deg in oklab, var(--one), var(--all))' } }), 'used last'), h('span', {}, h('i', { css: { background: 'var(--none)' } }), 'not needed')));
      if (picture.host.isConnected) picture.redraw();
    };
    show();
    const modes = [['uses', 'how many services need it'], ['order', 'order of first use'], ['segment', 'segment']];
    const controls = h('p', { class: 'controls' }, choice('Colour', modes, mode, (value) => { mode = value; show(); }), whose);
    section(n ? `zone-${n}` : 'zone', `Data zone of group ${zone.group}`, `Every page that a service of the group needs lies here once. From left to right and top to bottom; a cell is ${plural(zone.cell_pages, 'page')}. Pages of the same services lie together, inside that in the order of first use, so that a start reads few long runs.`, controls, picture.host, keys, folded('Segments and frames', table('A segment is one blob of frames that are compressed and digested on their own', [
      { title: 'segment', cell: (r) => `${r.n + 1}` }, { title: 'blob', cell: (r) => digest(r.digest) }, { title: 'first page', number: true, cell: (r) => count(r.base) }, { title: 'pages', number: true, cell: (r) => count(r.pages) },
      { title: 'frames', number: true, cell: (r) => count(r.frames) }, { title: 'compressed', number: true, cell: (r) => bytes(r.bytes) }, { title: 'of its pages', number: true, cell: (r) => percent(r.bytes, r.pages * 4096) }, { title: 'services', number: true, cell: (r) => count(r.services) },
    ], zone.segments.map((x, i) => ({ ...x, n: i })))));
  };

  const groupShares = () => {
    const host = section('sharing', 'What services of a group share', 'A page with the same content is stored and fetched once, however many services and files have it.');
    recording.sharing.forEach((group) => {
      const listed = group.sets.reduce((all, set) => all + set.pages, 0);
      const sets = listed < group.unique_pages ? [...group.sets, { pages: group.unique_pages - listed, services: ['other sets of services'] }] : group.sets;
      const picture = drawing(`Zone pages of group ${group.group} by the services that need them`, (width) => {
        const content = [];
        let x = 0;
        sets.forEach((set, n) => {
          const wide = (width * set.pages) / Math.max(1, group.unique_pages);
          content.push(s('rect', { x, y: 4, width: Math.max(0.5, wide - 1.5), height: 34, rx: 4, css: { fill: `var(${colours[n % colours.length]})` }, tip: [set.services.join(' + '), `${plural(set.pages, 'page')}, ${bytes(set.pages * 4096)}, ${percent(set.pages, group.unique_pages)} of the zone pages needed`] }));
          const text = fitted(set.services.join(' + '), wide - 16, 7);
          if (text) content.push(s('text', { x: x + 8, y: 25, class: 'inside light' }, text));
          x += wide;
        });
        return { height: 42, content };
      });
      host.append(h('p', {}, h('b', {}, group.group), `: ${plural(group.file_pages, 'file page')} on ${plural(group.unique_pages, 'zone page')}, ${count(group.shared_pages)} of them needed by more than one service; `, h('b', {}, `${bytes(group.saved_bytes)} saved`)), picture.host, folded('Sets of services', table('', [
        { title: 'needed by just', cell: (r) => r.services.join(' + ') }, { title: 'pages', number: true, cell: (r) => count(r.pages) }, { title: 'bytes', number: true, cell: (r) => bytes(r.pages * 4096) }, { title: 'share', number: true, cell: (r) => percent(r.pages, group.unique_pages) },
      ], sets)));
    });
    host.append(h('h4', {}, 'Services'), table('', [
      { title: 'service', cell: (r) => r.service }, { title: 'group', cell: (r) => r.group }, { title: 'ready by', class: 'path', cell: (r) => h('code', {}, r.ready) }, { title: 'files', number: true, cell: (r) => count(r.files) },
      { title: 'file pages', number: true, cell: (r) => count(r.file_pages) }, { title: 'zone pages', number: true, cell: (r) => count(r.zone_pages) }, { title: 'in frames of', number: true, cell: (r) => plural(r.frame_pages, 'page') },
      { title: 'an empty node fetches', number: true, cell: (r) => bytes(r.frame_bytes) }, { title: 'runtime image', cell: (r) => digest(r.manifest) },
    ], recording.services));
  };

  const drawRecording = () => {
    part('The recording');
    const zonePages = recording.sharing.reduce((all, g) => all + g.unique_pages, 0);
    const fetched = Math.max(...recording.services.map((x) => x.frame_bytes));
    tiles([
      ['of the image is touched', percent(recording.touched[0], recording.file_bytes), `${bytes(recording.touched[0])} of ${bytes(recording.file_bytes)} of files`, 'touched', true],
      ['files touched', count(recording.touched_files), `of ${count(recording.files)}`, 'touched_files'],
      ['zone pages', count(zonePages), `${bytes(zonePages * 4096)}, each content once`, 'zone_pages'],
      ['an empty node fetches', bytes(fetched), `${percent(fetched, recording.image_bytes)} of the image’s ${bytes(recording.image_bytes)}, compressed`, 'frame_bytes'],
      ['services', count(recording.services.length), `in ${plural(recording.sharing.length, 'group')}`, 'services'],
    ]);
    main.append(columnChoice());
    treemap();
    shares();
    orders();
    recording.zones.forEach(zoneMap);
    groupShares();
    const notes = [];
    if (recording.services.length > recording.columns.length) notes.push(`Only the first ${count(recording.columns.length)} of ${plural(recording.services.length, 'service')} are told apart in the pictures; “any service” counts all.`);
    if (recording.sets_left_out) notes.push(`${plural(recording.sets_left_out, 'set')} of services are summed up as others.`);
    notes.forEach((note) => main.append(h('p', { class: 'foot' }, note)));
  };

  // ---- All of it ----------------------------------------------------------------------------------------------------

  const tip = byId('tip');
  const point = (event) => {
    const element = event.target instanceof Element ? event.target : null;
    const told = element && tips.get(element);
    if (!told) { tip.hidden = true; return; }
    const lines = (typeof told === 'function' ? told(event) : told).filter(Boolean);
    tip.replaceChildren(...lines.map((line, n) => h(n ? 'span' : 'b', {}, line)));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const x = event.clientX + 14 + box.width > window.innerWidth ? event.clientX - 14 - box.width : event.clientX + 14;
    const y = event.clientY + 14 + box.height > window.innerHeight ? event.clientY - 14 - box.height : event.clientY + 14;
    tip.style.setProperty('left', `${Math.max(4, x)}px`);
    tip.style.setProperty('top', `${Math.max(4, y)}px`);
  };
  document.addEventListener('pointermove', point, { passive: true });
  document.addEventListener('pointerleave', () => { tip.hidden = true; });
  document.addEventListener('scroll', () => { tip.hidden = true; }, { passive: true });

  const draw = () => {
    const report = start && start.timeline.start;
    const image = (recording && recording.image) || (report && report.image) || '';
    byId('title').textContent = data.reference;
    document.title = `${data.reference} – tdfs report`;
    const facts = [image, report && report.service && `service ${report.service}`, start && `started ${start.timeline.began.replace('T', ' ').replace(/\.\d+Z/, ' UTC')}`];
    byId('subtitle').textContent = facts.filter(Boolean).join(' · ');
    if (start) drawStart(start);
    if (recording) drawRecording();
    drawings.forEach((redraw) => redraw());
    page.dataset.drawn = 'true';
  };
  let width = window.innerWidth;
  let pending = 0;
  window.addEventListener('resize', () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => drawings.forEach((redraw) => redraw()));
  });
  try { draw(); } catch (error) { fail(error.message); throw error; }
})();
